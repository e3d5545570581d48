"""Settings that identify a training run, and its device."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.studies.decoder import Shape
from benchmarks.studies.elsewhere import Images, Recurrent

LATER = {"points": 10, "change": None, "observe": 0, "weights": "float32", "adapters": 0}
"""Fields of a setting that came later, with the values of the runs before them: those are left out of its identity, so
that the results there were are still found.
"""


@dataclass(frozen=True)
class Setting:
    """Setting that all runs of a variant have in common.

    ``start`` names the weights that they go on from. ``points`` are of the validation curve. ``change``: from this
    share of the steps on, the learning rate is multiplied by this factor at once. ``observe``: after how many steps the
    optimizer is looked into again, 0 for never. ``weights`` is the dtype of weights and gradients. ``adapters`` is the
    rank of LoRA's, which alone are trained then; 0 for none.
    """

    shape: Shape | Recurrent | Images
    steps: int = 600
    batch: int = 16
    val_windows: int = 256
    bf16: bool = False
    start: str | None = None
    points: int = 10
    change: tuple[float, float] | None = None
    observe: int = 0
    weights: str = "float32"
    adapters: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """Convert to the form in JSON."""
        fields = {key: value for key, value in asdict(self).items() if key not in LATER or value != LATER[key]}
        return json.loads(json.dumps(fields))


@dataclass(frozen=True)
class Run:
    """One run: everything that its result depends on."""

    optimizer: dict[str, Any]
    lr: float
    seed: int
    setting: Setting
    text: str

    @property
    def key(self) -> str:
        return json.dumps(asdict(self) | {"setting": self.setting.identity}, sort_keys=True)


@dataclass(frozen=True)
class Device:
    """Settings of a device, which should not affect results."""

    type: str = "cpu"
    compile: bool = False
    graph: bool = True
    """Record forward and backward once and replay them: small models wait for kernel launches otherwise."""
