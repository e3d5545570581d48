"""Callbacks that log what an optimizer holds and what its low-rank momentum does not see."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adapm.optim import AdaPM
from lightning_adapm.report.diagnostics import OTHER, ResidualProbe, StateReport
from lightning_adapm.roles.piece import ROLES
from lightning_adapm.sharding.reduction import TRAFFIC
from lightning_adapm.trainer.callbacks.pooling import Pool, ResidualFigures
from lightning_adapm.trainer.callbacks.run import (
    StepClock,
    check_every_n_steps,
    log_figures,
    logged_step,
    optimizer_name,
    publish_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class OptimizerStateMonitor(L.Callback):
    """Logs how many bytes the state of the optimizers holds, of any kind and number, and draws them at the end.

    Logged, per process (the mean over processes): ``momentum_bytes``, ``second_moment_bytes``, ``total_bytes``,
    ``adamw_bytes`` (what ``torch.optim.AdamW`` would hold in float32), ``total_bytes_by_role/<role>``, the ratio
    ``ratio_to_adamw``; and ``total_bytes_all_processes``, their sum over processes. With several processes also
    ``exchanged_bytes_per_step``: what AdaPM's steps gave to collectives since the last log, on the first process. With
    ``update_in_backward`` also ``gradient_norm``, of the last step, whose gradients are gone. The figure is
    ``optimizer_state.png`` in the run's folder, and goes to TensorBoard.

    Args:
        every_n_steps: Optimizer steps from one log to the next, the first step included.
        log_key_prefix: Put before every name that is logged.

    Raises:
        MisconfigurationException: ``every_n_steps`` is not an int >= 1.
    """

    def __init__(self, every_n_steps: int = 50, log_key_prefix: str = "optimizer/") -> None:
        self.every_n_steps = check_every_n_steps(every_n_steps)
        self.log_key_prefix = log_key_prefix
        self.history: list[tuple[int, dict[str, float]]] = []
        """Step and logged figures, in order."""
        self._clock = StepClock(self.every_n_steps)
        self._exchanged = (0, 0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew, at the step where this run starts."""
        self.history = []
        self._clock = StepClock(self.every_n_steps, trainer.global_step)
        self._exchanged = (TRAFFIC.bytes, trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure and log, where the batch ended a step that logs."""
        if not self._clock.rings(trainer.global_step - 1):
            return
        logged = pooled_state(trainer.optimizers, pl_module, trainer.strategy.root_device, trainer.world_size)
        if trainer.world_size > 1:
            exchanged, steps = TRAFFIC.bytes, trainer.global_step
            logged["exchanged_bytes_per_step"] = (exchanged - self._exchanged[0]) / (steps - self._exchanged[1])
            self._exchanged = (exchanged, steps)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, AdaPM) and optimizer.gradient_norm is not None:
                logged["gradient_norm"] = float(optimizer.gradient_norm)
        logged = {self.log_key_prefix + name: value for name, value in logged.items()}
        self.history.append((logged_step(trainer), logged))
        log_figures(trainer, logged)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the figure."""
        if self.history:
            report = StateReport.measure(trainer.optimizers, pl_module)
            publish_figure(trainer, "optimizer_state", partial(_draw_state, report, optimizer_name(trainer)))


class ResidualNormMonitor(L.Callback):
    """Logs what AdaPM's low-rank momentum does not see of the gradient, and how large the updates are.

    Logged, none of it with a unit: ``norm_mean/<role>``, ``norm_max/<role>`` and ``norm_by_layer/<layer>`` of
    ``‖G - G RᵀR‖_F / ‖M^‖_F``; ``stationarity/<role>``, the cosine between this residual and the one logged before;
    ``update_max/<role>``, the largest ``|update| / lr`` before any clamp; ``clamped/<role>``, the share of entries
    beyond ``clip_threshold``. ``all`` stands for all roles together. Pieces and processes are averaged (``max``: the
    largest). ``nonfinite_gradients`` counts parameters and steps, all of them, whose gradient held an infinity or a
    NaN, which AdaPM takes as zero; a warning names the parameters.

    The other figures are taken from inside the steps that log; other steps do no extra work. The figure is
    ``residual_norm.png`` in the run's folder, and goes to TensorBoard. With several AdaPM optimizers their number
    follows the prefix. An optimizer without a low-rank momentum has no residual: the callback says so once.

    Args:
        every_n_steps: Optimizer steps from one log to the next, the first step included.
        log_key_prefix: Put before every name that is logged.

    Raises:
        MisconfigurationException: ``every_n_steps`` is not an int >= 1.
    """

    def __init__(self, every_n_steps: int = 50, log_key_prefix: str = "residual/") -> None:
        self.every_n_steps = check_every_n_steps(every_n_steps)
        self.log_key_prefix = log_key_prefix
        self.history: list[tuple[int, dict[str, float]]] = []
        """Step and logged figures, in order."""
        self._monitored: list[Monitored] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the optimizers that have a residual; say so where there is none."""
        self.history = []
        found = [o for o in trainer.optimizers if isinstance(o, AdaPM) and ResidualFigures(o).layers]
        prefixes = [self.log_key_prefix + (f"{index}/" if len(found) > 1 else "") for index in range(len(found))]
        clocks = [StepClock(self.every_n_steps, trainer.global_step) for _ in found]
        self._monitored = [Monitored(*each) for each in zip(found, prefixes, clocks, strict=True)]
        if not found:
            rank_zero_warn(
                f"ResidualNormMonitor logs nothing: {optimizer_name(trainer)} has no low-rank momentum, so there is no"
                " residual. Use AdaPM with a role whose momentum is low_rank, or leave the callback out"
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Put the probe into an optimizer whose step, which comes next, logs."""
        for monitored in self._monitored:
            if monitored.optimizer is optimizer and not monitored.optimizer.update_in_backward:
                monitored.remove_probe()
                if monitored.clock.rings(trainer.global_step):
                    monitored.insert_probe(trainer.global_step)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The same for an optimizer that may step inside of this backward, or of a later one of those accumulated."""
        for monitored in self._monitored:
            announced = monitored.due is not None
            if monitored.optimizer.update_in_backward and (announced or monitored.clock.rings(trainer.global_step)):
                monitored.insert_probe(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Take the probes out, and log what they saw."""
        for monitored in self._monitored:
            monitored.remove_probe()
            if monitored.due is None or monitored.due == trainer.global_step:
                continue
            monitored.due = None
            figures = pooled_residual(monitored, trainer.strategy.root_device)
            if figures:  # none, for example, where a gradient scaler skipped the step
                figures = {monitored.prefix + name: value for name, value in figures.items()}
                self.history.append((logged_step(trainer), figures))
                log_figures(trainer, figures)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the figures, and warn of what came after the last log."""
        for index, monitored in enumerate(self._monitored):
            monitored.count_nonfinite()
            history = [
                (step, figures) for step, figures in self.history if monitored.prefix + "norm_mean/all" in figures
            ]
            if history:
                name = "residual_norm" + (f"_{index}" if len(self._monitored) > 1 else "")
                publish_figure(trainer, name, partial(_draw_residual, history, monitored.prefix))


class Monitored:
    """An optimizer with its probe, which is in it during the steps that log only."""

    def __init__(self, optimizer: AdaPM, prefix: str, clock: StepClock) -> None:
        self.optimizer, self.prefix, self.clock = optimizer, prefix, clock
        self.probe = ResidualProbe()
        self.due: int | None = None
        """The step that logs next, once it has been announced."""
        self._nonfinite = optimizer.nonfinite_gradients()

    def insert_probe(self, step: int) -> None:
        self.due = step
        self.optimizer.observer = self.probe

    def count_nonfinite(self) -> int:
        """Gradients that were not finite since the optimizer was built; warns of those that are new."""
        found = self.optimizer.nonfinite_gradients()
        if found != self._nonfinite:
            new = {name: steps - self._nonfinite.get(name, 0) for name, steps in found.items()}
            steps = ", ".join(f"{name} ({count})" for name, count in new.items() if count)
            rank_zero_warn(f"Gradients with an infinity or a NaN, taken as zero, by parameter (steps): {steps}")
            self._nonfinite = found
        return sum(found.values())

    def remove_probe(self) -> None:
        if self.optimizer.observer is self.probe:
            self.optimizer.observer = None


def _draw_state(report: StateReport, name: str) -> "Figure":
    from lightning_adapm.trainer.callbacks.figures import state_figure

    return state_figure(report, name)


def _draw_residual(history: list[tuple[int, dict[str, float]]], prefix: str) -> "Figure":
    from lightning_adapm.trainer.callbacks.figures import residual_figure

    return residual_figure(history, prefix)


def pooled_state(
    optimizers: Iterable[Optimizer], module: nn.Module | None, device: torch.device, processes: int
) -> dict[str, float]:
    """What :class:`OptimizerStateMonitor` logs of the optimizers' state, by name; all processes take part."""
    figures = StateReport.measure(optimizers, module).figures()
    every_role = (f"total_bytes_by_role/{role}" for role in (*ROLES, OTHER))
    pool = _pool(sorted({*figures, *every_role}), device)
    pool.update((name, size, 1.0) for name, size in figures.items())
    logged = {name: mean for name, (mean, _) in pool.compute().items()}
    logged["total_bytes_all_processes"] = logged["total_bytes"] * processes
    logged["ratio_to_adamw"] = logged["total_bytes"] / max(1, logged["adamw_bytes"])
    return logged


def pooled_residual(monitored: Monitored, device: torch.device) -> dict[str, float]:
    """What :class:`ResidualNormMonitor` logs of what the probe has seen, by name; all processes take part."""
    names, readings = ResidualFigures(monitored.optimizer), monitored.probe.read()
    pool = _pool(names.names, device)
    pool.update(names.figures(readings))
    if readings:
        pool.update([("nonfinite_gradients", monitored.count_nonfinite(), 1.0)])
    return names.logged(pool.compute())


def _pool(names: list[str], device: torch.device) -> Pool:
    """On the device that the processes exchange tensors from."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    return Pool(names, dtype).to(device)
