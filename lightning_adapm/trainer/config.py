"""Settings of an optimizer and its schedule, for a module's attribute ``adapm``."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lightning_adapm.moments.policy import DEFAULT_RANK
from lightning_adapm.optim import AdaPM, PartialMuon, options, partial_muon

_SCHEDULES = ("cosine", "constant")
_SCHEDULE_FIELDS = ("warmup_steps", "schedule", "min_lr_ratio")


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of every optimizer: the learning rate and its schedule.

    Args:
        lr: Learning rate at its peak.
        warmup_steps: Number of optimizer steps in which the learning rate rises linearly to ``lr``; a float in [0, 1)
            is a share of all steps.
        schedule: ``"cosine"`` falls from ``lr`` to ``min_lr_ratio * lr`` at the last step of the Trainer's run.
            ``"constant"`` stays at ``lr``; without a warm-up there is no scheduler.
        min_lr_ratio: End of the cosine, as a share of ``lr``.

    Raises:
        ValueError: An option is out of range.
    """

    lr: float = 1e-3
    warmup_steps: int | float = field(default=0, kw_only=True)
    schedule: str = field(default="cosine", kw_only=True)
    min_lr_ratio: float = field(default=0.1, kw_only=True)
    make: ClassVar[type[Any]]
    """Class of the optimizer."""

    def __post_init__(self) -> None:
        if not _is_number(self.lr):
            raise ValueError(f"lr must be a number, but got {self.lr!r}{options.advice(self.lr)}")
        warmup = self.warmup_steps
        if not _is_number(warmup) or warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
            raise ValueError(
                "warmup_steps must be an int >= 0, or a float in [0, 1) for a share of all steps, but got"
                f" {warmup!r}{options.advice(warmup)}"
            )
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, but got {self.schedule!r}")
        if not _is_number(self.min_lr_ratio) or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be a number in [0, 1], but got {self.min_lr_ratio!r}")
        # the optimizer checks its own options when it is built; without parameters, no module is looked for
        self.make([{"params": []}], **self.optimizer_options)

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """Keyword arguments of the optimizer."""
        return {key: value for key, value in vars(self).items() if key not in _SCHEDULE_FIELDS}

    @staticmethod
    def resolve(settings: "OptimizerConfig | Mapping[str, Any] | None") -> "AdaPMConfig | PartialMuonConfig":
        """Make settings from a module's ``adapm`` attribute, with defaults for everything that it leaves out.

        In a mapping, ``optimizer`` is ``"adapm"``, the default, or ``"partial_muon"``.

        Raises:
            TypeError: The attribute is neither a mapping nor one of the settings' classes.
            ValueError: A key does not exist, or a value is out of range.
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
    """Settings of :class:`~lightning_adapm.AdaPM` and of its schedule, for a module's attribute ``adapm``.

    The options of the schedule are ``lr``, ``warmup_steps``, ``schedule`` and ``min_lr_ratio``; see
    :meth:`~lightning_adapm.AdaPMMixin.schedule`. All others are keyword arguments of AdaPM, with AdaPM's defaults.

    Raises:
        ValueError: An option is out of range.

    Example::

        adapm = AdaPMConfig(lr=1e-3, warmup_steps=100, second_moment="factored")
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    rank: int | float = DEFAULT_RANK
    update_proj_gap: int = 10
    debias: bool = True
    second_moment: str = "elementwise"
    momentum: Mapping[str, str] | str | None = None
    roles: Mapping[str, str] | None = None
    unmatched: str = "error"
    no_decay: Sequence[str] = ()
    state_dtype: options.StateDtype = options.AUTO
    basis: str = "auto"
    clip_threshold: float | None = 1.0
    maximize: bool = False
    rounding: str = "stochastic"
    update_in_backward: bool = False
    make = AdaPM


@dataclass(frozen=True)
class PartialMuonConfig(OptimizerConfig):
    """Settings of :class:`~lightning_adapm.PartialMuon` and of its schedule, for a module's attribute ``adapm``.

    The options of the schedule are those of :class:`~lightning_adapm.AdaPMConfig`. All others are keyword arguments of
    PartialMuon, with PartialMuon's defaults.

    Raises:
        ValueError: An option is out of range.
    """

    mu: float = 0.95
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    rank: int | float = partial_muon.DEFAULT_RANK
    update_proj_gap: int = 10
    momentum: Mapping[str, str] | str | None = None
    second_moment: str = "block"
    roles: Mapping[str, str] | None = None
    unmatched: str = "error"
    no_decay: Sequence[str] = ()
    state_dtype: options.StateDtype = options.AUTO
    basis: str = "auto"
    convolutions: bool = False
    ns_steps: int | None = None
    newton_schulz: str = options.AUTO
    maximize: bool = False
    rounding: str = "stochastic"
    update_in_backward: bool = False
    make = PartialMuon


_CONFIGS: dict[str, type[AdaPMConfig] | type[PartialMuonConfig]] = {
    "adapm": AdaPMConfig,
    "partial_muon": PartialMuonConfig,
}


def without_text_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the text ``"None"``, which jsonargparse makes of ``--model.adapm.clip_threshold=null``, by None."""
    return {key: None if value == "None" else value for key, value in options.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
