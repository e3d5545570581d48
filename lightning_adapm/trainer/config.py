"""Settings of an optimizer and its schedule: what a module's attribute ``adapm`` holds."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from lightning_adapm.moments.orthogonal import STEPS
from lightning_adapm.optim import AdaPM, PartialMuon, options

_SCHEDULES = ("cosine", "constant")
_SCHEDULE_FIELDS = ("warmup_steps", "schedule", "min_lr_ratio")


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings that every optimizer has: the learning rate and its schedule.

    Args:
        lr: Learning rate at its peak.
        warmup_steps: Optimizer steps over which the learning rate rises linearly to ``lr``; a float in [0, 1) is a
            share of all steps.
        schedule: ``"cosine"`` falls from ``lr`` to ``min_lr_ratio * lr`` at the last step of the run, whose length the
            Trainer knows; ``"constant"`` stays at ``lr``, and without a warm-up there is no scheduler at all.
        min_lr_ratio: Where the cosine ends, as a share of ``lr``.

    Raises:
        ValueError: An option out of range, named with what was found and what to write instead.
    """

    lr: float = 1e-3
    warmup_steps: int | float = field(default=0, kw_only=True)
    schedule: str = field(default="cosine", kw_only=True)
    min_lr_ratio: float = field(default=0.1, kw_only=True)
    make: ClassVar[type[Any]]
    """The optimizer."""

    def __post_init__(self) -> None:
        if not _is_number(self.lr):
            raise ValueError(f"lr must be a number, but got {self.lr!r} (YAML reads 1e-3 as text: write 1.0e-3)")
        warmup = self.warmup_steps
        if not _is_number(warmup) or warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
            raise ValueError(
                f"warmup_steps must be an int >= 0, or a float in [0, 1) for a share of all steps, but got {warmup!r}"
            )
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, but got {self.schedule!r}")
        if not _is_number(self.min_lr_ratio) or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be a number in [0, 1], but got {self.min_lr_ratio!r}")
        # the optimizer checks its own options, when it is built
        self.make([{"params": [torch.zeros(1)], "role": "norm"}], **self.optimizer_options)

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The keyword arguments of the optimizer."""
        return {key: value for key, value in vars(self).items() if key not in _SCHEDULE_FIELDS}

    @staticmethod
    def resolve(settings: "OptimizerConfig | Mapping[str, Any] | None") -> "AdaPMConfig | PartialMuonConfig":
        """The settings that a user's ``adapm`` attribute means; what it does not mention keeps its default.

        Of a mapping, ``optimizer`` is ``"adapm"``, the default, or ``"partial_muon"``.

        Raises:
            TypeError: Neither a mapping nor settings of one of the two.
            ValueError: A key that does not exist, with the nearest one that does, or a value out of range.
        """
        if isinstance(settings, (AdaPMConfig, PartialMuonConfig)):
            return settings
        if settings is not None and not isinstance(settings, Mapping):
            raise TypeError(f"adapm must be a dict or an AdaPMConfig, but got {type(settings).__name__}: {settings!r}")
        given = without_text_none(settings or {})
        name = given.pop("optimizer", "adapm")
        if name not in _CONFIGS:
            raise ValueError(f"adapm has optimizer {name!r}; write one of {', '.join(_CONFIGS)}")
        config = _CONFIGS[name]
        known = [each.name for each in dataclasses.fields(config)]
        for key in given:
            if key not in known:
                raise ValueError(f"adapm has no option {key!r}; {options.instead_of(str(key), known)}")
        return config(**given)


@dataclass(frozen=True)
class AdaPMConfig(OptimizerConfig):
    """The keyword arguments of :class:`~lightning_adapm.AdaPM`, and those of its schedule."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    rank: int | float = 0.05
    update_proj_gap: int = 10
    debias: bool = True
    second_moment: str = "elementwise"
    momentum: Mapping[str, str] | str | None = None
    roles: Mapping[str, str] | None = None
    unmatched: str = "error"
    no_decay: Sequence[str] = ()
    state_dtype: options.StateDtype = None
    basis: str = "auto"
    clip_threshold: float | None = 1.0
    maximize: bool = False
    update_in_backward: bool = False
    make = AdaPM


@dataclass(frozen=True)
class PartialMuonConfig(OptimizerConfig):
    """The keyword arguments of :class:`~lightning_adapm.PartialMuon`, and those of its schedule."""

    mu: float = 0.95
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    rank: int | float = 0.05
    update_proj_gap: int = 10
    momentum: Mapping[str, str] | str | None = None
    second_moment: str = "block"
    roles: Mapping[str, str] | None = None
    unmatched: str = "error"
    no_decay: Sequence[str] = ()
    state_dtype: options.StateDtype = None
    basis: str = "auto"
    convolutions: bool = False
    ns_steps: int = STEPS
    maximize: bool = False
    update_in_backward: bool = False
    make = PartialMuon


_CONFIGS: dict[str, type[AdaPMConfig] | type[PartialMuonConfig]] = {
    "adapm": AdaPMConfig,
    "partial_muon": PartialMuonConfig,
}


def without_text_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with None for the text ``"None"``, which jsonargparse makes of ``--model.adapm.clip_threshold=null``."""
    return {key: None if value == "None" else value for key, value in options.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
