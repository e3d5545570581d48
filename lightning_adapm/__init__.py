"""AdaPM for PyTorch Lightning and LitGPT: AdamW with a fraction of its momentum."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_adapm.litgpt.checkpoint import LitGPTCheckpoint
    from lightning_adapm.optim.adam_mini import AdamMini
    from lightning_adapm.optim.adamw import adamw_state_dict
    from lightning_adapm.optim.adapm import AdaPM
    from lightning_adapm.optim.lomo import AdaLomo, Lomo
    from lightning_adapm.optim.lora_pre import LoRAPre
    from lightning_adapm.optim.partial_muon import PartialMuon
    from lightning_adapm.report.explain import explain
    from lightning_adapm.trainer.callbacks.closing import ClosingTable
    from lightning_adapm.trainer.callbacks.monitors import OptimizerStateMonitor, ResidualNormMonitor
    from lightning_adapm.trainer.callbacks.summary import OptimizerSummary
    from lightning_adapm.trainer.config import AdaPMConfig, PartialMuonConfig
    from lightning_adapm.trainer.mixin import AdaPMMixin

__version__ = "0.2.0"

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
    "PartialMuon",
    "PartialMuonConfig",
    "ResidualNormMonitor",
    "adamw_state_dict",
    "explain",
]

# Imported when they are asked for: the optimizers need torch alone, and importing Lightning takes seconds.
_MODULES = {
    "AdaLomo": "optim.lomo",
    "AdaPM": "optim.adapm",
    "AdaPMConfig": "trainer.config",
    "AdaPMMixin": "trainer.mixin",
    "AdamMini": "optim.adam_mini",
    "ClosingTable": "trainer.callbacks.closing",
    "LitGPTCheckpoint": "litgpt.checkpoint",
    "LoRAPre": "optim.lora_pre",
    "Lomo": "optim.lomo",
    "OptimizerStateMonitor": "trainer.callbacks.monitors",
    "OptimizerSummary": "trainer.callbacks.summary",
    "PartialMuon": "optim.partial_muon",
    "PartialMuonConfig": "trainer.config",
    "ResidualNormMonitor": "trainer.callbacks.monitors",
    "adamw_state_dict": "optim.adamw",
    "explain": "report.explain",
}

# Class paths in YAML files written for version 0.1, such as lightning_adapm.litgpt_data.PreparedText.
_MOVED = {
    "callbacks": "trainer.callbacks",
    "cli": "trainer.cli",
    "litgpt_data": "litgpt.data",
    "mixin": "trainer.mixin",
    "preference": "litgpt.preference",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    elif name in _MOVED:
        value = importlib.import_module(f"{__name__}.{_MOVED[name]}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
