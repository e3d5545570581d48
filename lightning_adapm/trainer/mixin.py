"""AdaPM and its learning-rate schedule for a LightningModule that has no ``configure_optimizers`` of its own."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRScheduler
from torch.optim import Optimizer

from lightning_adapm.moments.policy import momentum_table
from lightning_adapm.optim import AdaPM, options
from lightning_adapm.optim.in_backward import check_clipping
from lightning_adapm.trainer.schedule import Pace, Schedule, total_steps

if TYPE_CHECKING:
    _Module = L.LightningModule
else:
    _Module = object

_SCHEDULES = ("cosine", "constant")
_SCHEDULE_FIELDS = ("warmup_steps", "schedule", "min_lr_ratio")

# They replace parameters by others than the optimizer was given, or run the step themselves.
_UNSUPPORTED_STRATEGIES = (
    strategies.DeepSpeedStrategy,
    strategies.XLAStrategy,
    strategies.SingleDeviceXLAStrategy,
)


@dataclass(frozen=True)
class AdaPMConfig:
    """Settings of optimizer and schedule: the keyword arguments of :class:`~lightning_adapm.AdaPM`, and three more.

    Args:
        warmup_steps: Optimizer steps over which the learning rate rises linearly to ``lr``; a float in [0, 1) is a
        share of all steps.
        schedule: ``"cosine"`` falls from ``lr`` to ``min_lr_ratio * lr`` at the last step of the run, whose length the
            Trainer knows; ``"constant"`` stays at ``lr``, and without a warm-up there is no scheduler at all.
        min_lr_ratio: Where the cosine ends, as a share of ``lr``.

    Raises:
        ValueError: An option out of range, named with what was found and what to write instead.
    """

    lr: float = 1e-3
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
    warmup_steps: int | float = 0
    schedule: str = "cosine"
    min_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        if not _is_number(self.lr):
            raise ValueError(f"lr must be a number, but got {self.lr!r} (YAML reads 1e-3 as text: write 1.0e-3)")
        options.check(vars(self))
        options.check_roles(self.roles, self.unmatched)
        options.dtype_names(self.state_dtype)
        momentum_table(self.momentum, self.unmatched)
        warmup = self.warmup_steps
        if not _is_number(warmup) or warmup < 0 or (isinstance(warmup, float) and warmup >= 1):
            raise ValueError(
                f"warmup_steps must be an int >= 0, or a float in [0, 1) for a share of all steps, but got {warmup!r}"
            )
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, but got {self.schedule!r}")
        if not _is_number(self.min_lr_ratio) or not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be a number in [0, 1], but got {self.min_lr_ratio!r}")

    @classmethod
    def resolve(cls, settings: "AdaPMConfig | Mapping[str, Any] | None") -> "AdaPMConfig":
        """The settings that a user's ``adapm`` attribute means; what it does not mention keeps its default.

        Raises:
            TypeError: Neither a mapping nor an :class:`AdaPMConfig`.
            ValueError: A key that does not exist, with the nearest one that does, or a value out of range.
        """
        if isinstance(settings, cls):
            return settings
        if settings is not None and not isinstance(settings, Mapping):
            raise TypeError(f"adapm must be a dict or an AdaPMConfig, but got {type(settings).__name__}: {settings!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in settings or {}:
            if key not in known:
                raise ValueError(f"adapm has no option {key!r}; {options.instead_of(str(key), known)}")
        return cls(**without_text_none(settings or {}))

    @property
    def optimizer_options(self) -> dict[str, Any]:
        """The keyword arguments of :class:`~lightning_adapm.AdaPM`."""
        return {key: value for key, value in vars(self).items() if key not in _SCHEDULE_FIELDS}


class AdaPMMixin(_Module):
    """Gives a LightningModule ``configure_optimizers`` with AdaPM: ``class MyModule(AdaPMMixin, L.LightningModule)``.

    The settings are the attribute ``adapm``, of the class or the instance: a dict, an :class:`AdaPMConfig`, or None for
    the defaults. A class that defines ``configure_optimizers`` itself keeps its own, and may call :meth:`schedule`
    in it.

    Raises:
        TypeError: At class creation, where ``LightningModule`` comes before the mixin and hides it.
    """

    adapm: AdaPMConfig | Mapping[str, Any] | None = None
    __jit_unused_properties__ = ["lr", "adapm_options", *L.LightningModule.__jit_unused_properties__]  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.configure_optimizers is L.LightningModule.configure_optimizers:
            bases = ", ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(
                f"class {cls.__name__}({bases}): LightningModule comes before AdaPMMixin and hides its"
                f" configure_optimizers; write class {cls.__name__}(AdaPMMixin, ...)"
            )

    @property
    def lr(self) -> float:
        """The learning rate: what was assigned here, else the one of ``adapm``.

        An assignment wins over ``adapm["lr"]``, and one warning says so. While the module trains, it changes what the
        schedule multiplies, as ``LearningRateFinder`` wants it.
        """
        assigned: float | None = self.__dict__.get("_adapm_lr")
        return AdaPMConfig.resolve(self.adapm).lr if assigned is None else assigned

    @lr.setter
    def lr(self, lr: float | None) -> None:
        self.__dict__["_adapm_lr"] = lr
        trainer = self.__dict__.get("_trainer")
        self.__dict__["_adapm_lr_found"] = trainer is not None
        for config in () if trainer is None else trainer.lr_scheduler_configs:
            if lr is not None and isinstance(config.scheduler, Schedule):
                config.scheduler.rebase(lr)

    @property
    def adapm_options(self) -> dict[str, Any]:
        """The keyword arguments of :class:`~lightning_adapm.AdaPM` that the settings mean."""
        return AdaPMConfig.resolve(self.adapm).optimizer_options | {"lr": self.lr}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdaPM over all parameters of the module, with the schedule of its settings.

        Raises:
            MisconfigurationException: A strategy that AdaPM does not support, or a schedule over an endless run.
            ValueError: Settings out of range, or matrices whose role is not known.
        """
        config = dataclasses.replace(AdaPMConfig.resolve(self.adapm), lr=self.lr)
        self._say_which_lr()
        if self._trainer is not None:
            check_strategy(self._trainer.strategy)
            if config.update_in_backward:
                check_clipping(self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm)
        optimizer = AdaPM(self.named_parameters(), **config.optimizer_options)
        self._log_settings(config, optimizer)
        return self.schedule(optimizer)

    def schedule(self, optimizer: Optimizer) -> OptimizerLRScheduler:
        """Any optimizer with the warm-up and schedule of ``adapm``, as ``configure_optimizers`` returns it.

        The schedule multiplies the optimizer's own learning rates and is stepped once per optimizer step; with manual
        optimization that is up to the module (``self.lr_schedulers().step()``). A resumed run takes the rate that is
        multiplied and the number of the step from its checkpoint, and warm-up, length and end from its own settings.

        Returns:
            The optimizer itself where nothing changes its learning rate, else Lightning's dict.

        Raises:
            MisconfigurationException: The schedule needs the number of steps and the Trainer does not know it.
        """
        config = AdaPMConfig.resolve(self.adapm)
        warmup, cosine = config.warmup_steps, config.schedule == "cosine"
        if not cosine and not warmup:
            return optimizer
        steps = self._total_steps(config) if cosine or isinstance(warmup, float) else None
        pace = None if steps is None else Pace.of(self.trainer)
        schedule = Schedule(
            optimizer, warmup=warmup, cosine=cosine, min_ratio=config.min_lr_ratio, steps=steps, pace=pace
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:
        """Step a scheduler as Lightning does, after a look at whether the run still has the steps it was built for."""
        if isinstance(scheduler, Schedule):
            scheduler.follow(self.trainer)
        super().lr_scheduler_step(scheduler, metric)

    def _total_steps(self, config: AdaPMConfig) -> int:
        steps = total_steps(self.trainer)
        if steps is None:
            reason = f"schedule: {config.schedule}"
            if config.schedule == "constant":
                reason = f"warmup_steps: {config.warmup_steps} (a share of all steps)"
            raise MisconfigurationException(
                f"adapm has {reason}, which needs the number of steps, but this run has no end that the Trainer knows"
                " (max_steps=-1, and max_epochs=-1 or data without a length). Set Trainer(max_steps=...), or use"
                " schedule: constant, with warm-up as a number of steps"
            )
        return steps

    def _say_which_lr(self) -> None:
        given = self.adapm.get("lr") if isinstance(self.adapm, Mapping) else getattr(self.adapm, "lr", None)
        if given not in (None, self.lr) and not self.__dict__["_adapm_lr_found"]:
            rank_zero_warn(f"lr={self.lr}, assigned to {type(self).__name__}.lr, is used instead of adapm's lr={given}")

    def _log_settings(self, config: AdaPMConfig, optimizer: AdaPM) -> None:
        """What the optimizer resolved the settings to, beside the module's own hyperparameters."""
        trainer = self._trainer
        if trainer is None or not trainer.enable_autolog_hparams:
            return
        callbacks = getattr(trainer, "callbacks", ())
        if any(isinstance(callback, LearningRateFinder) and callback._early_exit for callback in callbacks):
            return  # Tuner.lr_find tries out: the run to log comes later, with another learning rate
        settings = {
            **vars(config),
            **optimizer.defaults,
            "roles": dict(config.roles or {}),
            "betas": list(config.betas),
        }
        for logger in trainer.loggers:
            logger.log_hyperparams({"adapm_settings": settings})


def without_text_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with None for the text ``"None"``, which jsonargparse makes of ``--model.adapm.clip_threshold=null``."""
    return {key: None if value == "None" else value for key, value in options.items()}


def check_strategy(strategy: strategies.Strategy) -> None:
    """Refuse strategies under which AdaPM would not be the optimizer that it is on one device.

    Raises:
        MisconfigurationException: Naming the strategy and what works.
    """
    if isinstance(strategy, _UNSUPPORTED_STRATEGIES):
        raise MisconfigurationException(
            f"AdaPM does not support {type(strategy).__name__} yet. It works on a single device and with DDP, FSDP and"
            " FSDP2: Trainer(strategy='auto'), 'ddp', 'fsdp' or ModelParallelStrategy(...)"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
