"""AdaPM for PyTorch Lightning and LitGPT: AdamW with a fraction of its momentum."""

from lightning_adapm.callbacks import (
    ClosingTable,
    LitGPTCheckpoint,
    OptimizerStateMonitor,
    OptimizerSummary,
    ResidualNormMonitor,
)
from lightning_adapm.explanation import explain
from lightning_adapm.mixin import AdaPMConfig, AdaPMMixin
from lightning_adapm.optim import AdaPM

__all__ = [
    "AdaPM",
    "AdaPMConfig",
    "AdaPMMixin",
    "ClosingTable",
    "LitGPTCheckpoint",
    "OptimizerStateMonitor",
    "OptimizerSummary",
    "ResidualNormMonitor",
    "explain",
]
