"""The schedule in a LightningModule's ``adapm`` settings: warm-up, cosine, and their number of steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class Pace(NamedTuple):
    """Settings that determine the number of steps, and that callbacks change after the optimizers are built."""

    batches: float
    accumulated: int
    max_steps: int
    """Limit of the run. While a finder makes a trial run, it differs."""

    @classmethod
    def of(cls, trainer: L.Trainer) -> Pace:
        """Read the present epoch's settings, with the accumulation that a scheduler is about to set."""
        scheduler = _accumulation(trainer)
        if scheduler is None:
            accumulated = trainer.accumulate_grad_batches
        else:
            accumulated = scheduler.get_accumulate_grad_batches(trainer.current_epoch)
        return cls(trainer.num_training_batches, accumulated, trainer.max_steps)


@dataclass
class _Span:
    """Form and length of a schedule; not part of a checkpoint."""

    warmup: int | float
    cosine: bool
    min_ratio: float
    steps: int | None
    pace: Pace | None
    begun: bool = False

    def factor(self) -> partial[float]:
        warmup = round(self.warmup * (self.steps or 0)) if isinstance(self.warmup, float) else self.warmup
        return partial(lr_factor, warmup=warmup, total=self.steps if self.cosine else None, min_ratio=self.min_ratio)


class Schedule(LambdaLR):
    """Multiplies the learning rates of all groups of an optimizer by :func:`lr_factor`.

    Base rates and the number of the step come from a checkpoint. Warm-up, length and end are those of the code; where
    the checkpoint had others, one warning says so. Groups added while training keep the rate that they come with and
    follow the schedule from there.

    Args:
        optimizer: Optimizer whose learning rates are multiplied.
        warmup: Steps of the warm-up; a float in [0, 1) is a share of ``steps``.
        cosine: Whether the rates fall after the warm-up.
        min_ratio: Factor at the end of the cosine.
        steps: Steps of the run; needed by the cosine and by a warm-up given as a share.
        pace: The Trainer's settings for which ``steps`` were counted.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup: int | float,
        cosine: bool,
        min_ratio: float,
        steps: int | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._span = _Span(warmup, cosine, min_ratio, steps, pace)
        super().__init__(optimizer, self._span.factor())

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments of :func:`lr_factor`."""
        factor = self.lr_lambdas[0]
        assert isinstance(factor, partial)
        return factor.keywords

    def follow(self, trainer: L.Trainer) -> None:
        """Adopt the number of steps that a callback set before the first step; warn where one changes it later."""
        span, pace = self._span, Pace.of(trainer)
        if span.pace is None or span.pace.max_steps != pace.max_steps:
            return
        begun, span.begun = span.begun, True
        if span.pace == pace:
            return
        span.pace, steps = pace, total_steps(trainer)
        if steps is None or steps == span.steps:
            return
        if not begun:
            span.steps = steps
            self.lr_lambdas = [span.factor()] * len(self.lr_lambdas)
            return
        span.pace = None
        rank_zero_warn(
            f"the learning-rate schedule has {span.steps} steps, but the run now takes another number: an epoch"
            f" has {pace.batches} batches, and a step {pace.accumulated} of them. Change accumulation only with"
            " GradientAccumulationScheduler, which the schedule follows, or set Trainer(max_steps=...)"
        )

    def rebase(self, lr: float) -> None:
        """Make ``lr`` the base rate from the next step on, whatever a finder writes into the groups before it."""
        self.base_lrs = [lr] * len(self.optimizer.param_groups)
        self.lr_lambdas = self.lr_lambdas[:1] * len(self.base_lrs)

        def write(*_: Any) -> None:
            handle.remove()
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=False):
                group["initial_lr"] = base
                group["lr"] = base * self.lr_lambdas[0](self.last_epoch)

        handle = self.optimizer.register_step_pre_hook(write)

    def get_lr(self) -> list[Any]:
        """Learning rates of this step; groups added since the last step join the schedule at their present rate."""
        now = self.lr_lambdas[0](self.last_epoch - 1)
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(group.setdefault("initial_lr", group["lr"] / now if now else group["lr"]))
        self.lr_lambdas += self.lr_lambdas[:1] * (len(self.base_lrs) - len(self.lr_lambdas))
        return super().get_lr()

    def state_dict(self) -> dict[str, Any]:
        """Base rates and the number of the step, and the settings for comparison on loading."""
        state = super().state_dict()
        del state["_span"]
        return {**state, "lr_lambdas": [None] * len(self.lr_lambdas), "settings": self.settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` or a plain ``LambdaLR`` has saved."""
        state = {key: value for key, value in state_dict.items() if key != "settings"}
        super().load_state_dict({**state, "lr_lambdas": []})
        saved = state_dict.get("settings") or {}
        now = self.settings
        changed = [f"{key}={now[key]} (was {saved[key]})" for key in saved if saved[key] != now[key]]
        if changed:
            rank_zero_warn(f"the learning rate follows this run's schedule, not the checkpoint's: {', '.join(changed)}")


def lr_factor(step: int, *, warmup: int, total: int | None, min_ratio: float) -> float:
    """Factor of the learning rate in a step, counted from 0.

    It rises linearly to 1 over ``warmup`` steps, falls as a cosine to ``min_ratio`` at ``total``, and stays there. With
    ``total=None`` it stays at 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if total is None:
        return 1.0
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * share))


def total_steps(trainer: L.Trainer) -> int | None:
    """Number of optimizer steps of the whole run, with a ``GradientAccumulationScheduler``; None if endless."""
    if trainer.limit_train_batches == 0:
        return 0
    steps = trainer.estimated_stepping_batches  # reads the data, too
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    scheduler = _accumulation(trainer)
    if scheduler is not None and epochs not in (None, -1) and math.isfinite(batches):
        factors = map(scheduler.get_accumulate_grad_batches, range(max(1, epochs)))
        steps = sum(math.ceil(batches / factor) for factor in factors)
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return None if math.isinf(steps) or steps < 0 else int(steps)  # -1: an iterable dataset without a length


def _accumulation(trainer: L.Trainer) -> GradientAccumulationScheduler | None:
    found = (each for each in getattr(trainer, "callbacks", ()) if isinstance(each, GradientAccumulationScheduler))
    return next(found, None)
