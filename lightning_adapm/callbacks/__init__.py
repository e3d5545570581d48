"""Lightning callbacks: thin shells over :mod:`lightning_adapm.diagnostics` and :mod:`lightning_adapm.planner`."""

from lightning_adapm.callbacks.closing import ClosingTable
from lightning_adapm.callbacks.litgpt_checkpoint import LitGPTCheckpoint
from lightning_adapm.callbacks.monitors import OptimizerStateMonitor, ResidualNormMonitor
from lightning_adapm.callbacks.summary import OptimizerSummary

__all__ = ["ClosingTable", "LitGPTCheckpoint", "OptimizerStateMonitor", "OptimizerSummary", "ResidualNormMonitor"]
