"""AdaPM and its learning-rate schedule for a LightningModule without its own ``configure_optimizers``."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch import strategies
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerTypeUnion, OptimizerLRScheduler
from torch.optim import Optimizer

from lightning_adapm.optim.clipping import check_clipping
from lightning_adapm.trainer.config import AdaPMConfig, OptimizerConfig, PartialMuonConfig
from lightning_adapm.trainer.schedule import Pace, Schedule, total_steps

if TYPE_CHECKING:
    _Module = L.LightningModule
else:
    _Module = object

# Strategies that replace the parameters given to the optimizer, or run the step themselves.
_UNSUPPORTED_STRATEGIES = (
    strategies.DeepSpeedStrategy,
    strategies.XLAStrategy,
    strategies.SingleDeviceXLAStrategy,
)


class AdaPMMixin(_Module):
    """A ``configure_optimizers`` with AdaPM for a LightningModule: ``class MyModule(AdaPMMixin, L.LightningModule)``.

    The settings are the attribute ``adapm``, of the class or the instance: a dict, an :class:`AdaPMConfig`, or None for
    the defaults. ``{"optimizer": "partial_muon", ...}``, or a :class:`PartialMuonConfig`, gives
    :class:`~lightning_adapm.PartialMuon` instead. A class that defines ``configure_optimizers`` itself keeps its own,
    and may call :meth:`schedule` in it.

    Raises:
        TypeError: At class creation, where ``LightningModule`` comes before the mixin and hides it.

    Example::

        class MyModule(AdaPMMixin, L.LightningModule):
            adapm = {"lr": 1e-3, "warmup_steps": 100, "second_moment": "factored"}
    """

    adapm: OptimizerConfig | Mapping[str, Any] | None = None
    resumes: bool = False
    """Whether a checkpoint is about to replace all weights, so that others need not be read: ``lightning-adapm fit
    --ckpt_path PATH`` sets it before the module is configured."""
    __jit_unused_properties__ = ["lr", "adapm_class", "adapm_options", *L.LightningModule.__jit_unused_properties__]  # noqa: RUF012

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
        """The learning rate: the one assigned to this attribute, or else that of ``adapm``.

        An assignment takes precedence over ``adapm["lr"]``, with a warning. While the module trains, it changes the
        rate that the schedule multiplies, as ``LearningRateFinder`` expects.
        """
        assigned: float | None = self.__dict__.get("_adapm_lr")
        return OptimizerConfig.resolve(self.adapm).lr if assigned is None else assigned

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
        """Keyword arguments of :attr:`adapm_class` in the settings."""
        return OptimizerConfig.resolve(self.adapm).optimizer_options | {"lr": self.lr}

    @property
    def adapm_class(self) -> type[Any]:
        """Class of the optimizer in the settings."""
        return OptimizerConfig.resolve(self.adapm).make

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build AdaPM or PartialMuon over all parameters of the module, with the schedule of its settings.

        Raises:
            MisconfigurationException: The strategy is not supported, or an endless run has a schedule over its length.
            ValueError: A setting is out of range, or a matrix has no role.
        """
        config = dataclasses.replace(OptimizerConfig.resolve(self.adapm), lr=self.lr)
        self._say_which_lr()
        if self._trainer is not None:
            check_strategy(self._trainer.strategy)
            if config.update_in_backward:
                check_clipping(self._trainer.gradient_clip_val, self._trainer.gradient_clip_algorithm)
        optimizer = config.make(self.named_parameters(), **config.optimizer_options)
        self._log_settings(config, optimizer)
        return self.schedule(optimizer)

    def schedule(self, optimizer: Optimizer) -> OptimizerLRScheduler:
        """Add the warm-up and the schedule of ``adapm`` to any optimizer; return what ``configure_optimizers`` should.

        The schedule multiplies the optimizer's own learning rates and is stepped once per optimizer step; with manual
        optimization, the module does that (``self.lr_schedulers().step()``). A resumed run takes the base rate and the
        number of the step from its checkpoint, and the warm-up, length and final rate from its own settings.

        Returns:
            The optimizer itself if nothing changes its learning rate, else Lightning's dict.

        Raises:
            MisconfigurationException: The schedule needs the number of steps, and the Trainer has none.
        """
        config = OptimizerConfig.resolve(self.adapm)
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
        """Step a scheduler as Lightning does, after checking that the run still has the same number of steps."""
        if isinstance(scheduler, Schedule):
            scheduler.follow(self.trainer)
        super().lr_scheduler_step(scheduler, metric)

    def _total_steps(self, config: OptimizerConfig) -> int:
        steps = total_steps(self.trainer)
        if steps is None:
            reason = f"schedule: {config.schedule}"
            if config.schedule == "constant":
                reason = f"warmup_steps: {config.warmup_steps} (a share of all steps)"
            raise MisconfigurationException(
                f"adapm has {reason}, which needs the number of steps, but the Trainer cannot know it for this run"
                " (max_steps=-1, and max_epochs=-1 or data without a length). Set Trainer(max_steps=...), or use"
                " schedule: constant, with the warm-up as a number of steps"
            )
        return steps

    def _say_which_lr(self) -> None:
        given = self.adapm.get("lr") if isinstance(self.adapm, Mapping) else getattr(self.adapm, "lr", None)
        if given not in (None, self.lr) and not self.__dict__["_adapm_lr_found"]:
            rank_zero_warn(f"lr={self.lr}, assigned to {type(self).__name__}.lr, is used instead of adapm's lr={given}")

    def _log_settings(self, config: AdaPMConfig | PartialMuonConfig, optimizer: Optimizer) -> None:
        """Log the settings as the optimizer resolved them, with the module's own hyperparameters."""
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


def check_strategy(strategy: strategies.Strategy) -> None:
    """Refuse strategies under which an optimizer would not train as on one device.

    Raises:
        MisconfigurationException: The strategy is one of those.
    """
    if isinstance(strategy, _UNSUPPORTED_STRATEGIES):
        raise MisconfigurationException(
            f"{type(strategy).__name__} is not supported yet. The optimizers work on a single device and with DDP,"
            " FSDP and FSDP2: Trainer(strategy='auto'), 'ddp', 'fsdp' or ModelParallelStrategy(...)"
        )
