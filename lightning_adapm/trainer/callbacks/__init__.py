"""Lightning callbacks: thin shells over :mod:`lightning_adapm.report`."""

from lightning_adapm.trainer.callbacks.closing import ClosingTable
from lightning_adapm.trainer.callbacks.monitors import OptimizerStateMonitor, ResidualNormMonitor
from lightning_adapm.trainer.callbacks.summary import OptimizerSummary

__all__ = ["ClosingTable", "OptimizerStateMonitor", "OptimizerSummary", "ResidualNormMonitor"]
