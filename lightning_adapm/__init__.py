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
from lightning_adapm.optim import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre

__all__ = [
    "AdaLomo",
    "AdaPM",
    "AdaPMConfig",
    "AdaPMMixin",
    "AdamMini",
    "ClosingTable",
    "LitGPTCheckpoint",
    "LoRAPre",
    "Lomo",
    "OptimizerStateMonitor",
    "OptimizerSummary",
    "ResidualNormMonitor",
    "explain",
]
