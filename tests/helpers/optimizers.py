"""Every optimizer that the package exports, in the settings that tests of all optimizers use.

A new optimizer is found here by itself, with its defaults. Settings that make it another algorithm are added to
``SETTINGS``.
"""

from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch

import lightning_adapm

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "AdaPM": {
        "elementwise": {"rank": 1, "update_proj_gap": 3},
        "block": {"rank": 1, "second_moment": "block", "momentum": "compact"},
        "factored": {"rank": 1, "second_moment": "factored", "momentum": "compact", "state_dtype": "bfloat16"},
    },
    "PartialMuon": {
        "": {"rank": 1, "update_proj_gap": 3},
        "full": {"momentum": "full", "second_moment": "factored", "state_dtype": "int8"},
        "bfloat16": {"rank": 1, "state_dtype": "bfloat16", "nesterov": False},
    },
    "LoRAPre": {"adam": {"rank": 1}, "muon": {"rank": 1, "variant": "muon"}},
}


@dataclass(frozen=True)
class Case:
    """An optimizer with settings of its own."""

    make: type[torch.optim.Optimizer]
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        return self.make(params, **{"lr": 1e-2, **self.settings, **options})

    def takes(self, option: str) -> bool:
        """Whether the constructor has an option."""
        return option in signature(self.make).parameters


def exported() -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizers among the package's exports, by name."""
    found = {name: getattr(lightning_adapm, name) for name in lightning_adapm.__all__}
    return {
        name: each for name, each in found.items() if isinstance(each, type) and issubclass(each, torch.optim.Optimizer)
    }


REFERENCE = Case(torch.optim.AdamW)
CASES = {
    f"{name} {setting}".strip(): Case(make, options)
    for name, make in exported().items()
    for setting, options in SETTINGS.get(name, {"": {}}).items()
}
