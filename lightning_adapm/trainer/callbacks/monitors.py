"""Callbacks that log an optimizer's bytes of state and the residual of its low-rank momentum."""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_debug, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.report.diagnostics import OTHER, ResidualProbe, StateReport
from lightning_adapm.report.tables import markdown_table
from lightning_adapm.roles.piece import ROLES
from lightning_adapm.sharding.collectives import TRAFFIC
from lightning_adapm.trainer.callbacks.pooling import Pool, ResidualFigures
from lightning_adapm.trainer.callbacks.run import (
    StepClock,
    check_every_n_steps,
    log_figures,
    logged_step,
    optimizer_name,
    publish_figure,
    publish_text,
    run_folder,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class OptimizerStateMonitor(L.Callback):
    """Log the bytes of state of all optimizers, of any class, and draw them at the end.

    Means over processes are ``momentum_bytes``, ``second_moment_bytes``, ``total_bytes``,
    ``total_bytes_by_role/<role>``, and ``adamw_bytes``, the bytes that ``torch.optim.AdamW`` would hold in float32.
    Further figures are:

    - ``ratio_to_adamw``, total bytes relative to AdamW's.
    - ``total_bytes_all_processes``, the sum over processes.
    - ``exchanged_bytes_per_step`` with several processes: bytes that the first process gave to collectives, per step
      since the last log.
    - ``gradient_norm`` with ``update_in_backward``: the norm of the last step's gradients, which are no longer held.

    The figure is saved as ``optimizer_state.png`` in the run's folder and shown in TensorBoard, with a table of the
    first process's bytes by role (``optimizer_state`` under Text).

    Args:
        every_n_steps: Optimizer steps between two logs; the first step logs, too.
        log_key_prefix: Prefix of every logged name.

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
        """Start a new history at the first step of this run."""
        self.history = []
        self._clock = StepClock(self.every_n_steps, trainer.global_step)
        self._exchanged = (TRAFFIC.bytes, trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Measure and log if the batch ended a step that logs."""
        if not self._clock.rings(trainer.global_step - 1):
            return
        logged = pooled_state(trainer.optimizers, pl_module, trainer.strategy.root_device, trainer.world_size)
        if trainer.world_size > 1:
            exchanged, steps = TRAFFIC.bytes, trainer.global_step
            logged["exchanged_bytes_per_step"] = (exchanged - self._exchanged[0]) / (steps - self._exchanged[1])
            self._exchanged = (exchanged, steps)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, RoleOptimizer) and optimizer.gradient_norm is not None:
                logged["gradient_norm"] = float(optimizer.gradient_norm)
        logged = {self.log_key_prefix + name: value for name, value in logged.items()}
        self.history.append((logged_step(trainer), logged))
        log_figures(trainer, logged)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Publish the table and the figure."""
        folder, name = run_folder(trainer), optimizer_name(trainer)
        if self.history:
            report = StateReport.measure(trainer.optimizers, pl_module)
            publish_text(trainer, "optimizer_state", markdown_table(report, name))
            publish_figure(trainer, folder, "optimizer_state", partial(_draw_state, report, name))


class ResidualNormMonitor(L.Callback):
    """Log the part of the gradient outside AdaPM's low-rank momentum, and the size of the updates.

    The figures have no unit:

    - ``norm_mean/<role>``, ``norm_max/<role>`` and ``norm_by_layer/<layer>``: the norm of the residual relative to the
      direction, ``‖G - G RᵀR‖_F / ‖M^‖_F``.
    - ``stationarity/<role>``: the cosine between this residual and the one logged before.
    - ``orthogonality/<role>`` with PartialMuon: ``‖U Uᵀ - I‖_F / sqrt(m)`` of the orthogonal update ``U``, on its
      smaller side, estimated to about 5 %. It is 0 for an orthogonal matrix and 1 for zero.
    - ``update_max/<role>``: the largest ``|update| / lr`` before any clamp.
    - ``clamped/<role>``: the share of entries beyond ``clip_threshold``.
    - ``nonfinite_gradients``: the number of gradients, over parameters and all steps so far, with an infinity or a NaN.
      They count as zero. A warning names the parameters.

    The role ``all`` stands for all roles together. Figures are means over pieces and processes; ``max`` is the largest.
    Steps that do not log do no extra work. The figure is saved as ``residual_norm.png`` in the run's folder and shown
    in TensorBoard. With several optimizers, their number follows the prefix.

    An optimizer without low-rank momentum has no residual, and nothing is logged. A warning is given if it is one of
    this package. Other optimizers, such as AdamW in a run to compare with, are passed over in silence.

    Args:
        every_n_steps: Optimizer steps between two logs; the first step logs, too.
        log_key_prefix: Prefix of every logged name.

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
        """Find the optimizers that have a residual; warn where there could be one and is none."""
        self.history = []
        ours = [optimizer for optimizer in trainer.optimizers if isinstance(optimizer, RoleOptimizer)]
        found = [optimizer for optimizer in ours if ResidualFigures(optimizer).layers]
        prefixes = [self.log_key_prefix + (f"{index}/" if len(found) > 1 else "") for index in range(len(found))]
        clocks = [StepClock(self.every_n_steps, trainer.global_step) for _ in found]
        self._monitored = [Monitored(*each) for each in zip(found, prefixes, clocks, strict=True)]
        if not found:
            say = rank_zero_warn if ours else rank_zero_debug
            say(
                f"ResidualNormMonitor logs nothing: {optimizer_name(trainer)} has no low-rank momentum, so there is no"
                " residual. Use AdaPM with a role whose momentum is low_rank, or leave the callback out"
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Insert the probe if the optimizer's next step logs."""
        for monitored in self._monitored:
            if monitored.optimizer is optimizer and not monitored.optimizer.update_in_backward:
                monitored.remove_probe()
                if monitored.clock.rings(trainer.global_step):
                    monitored.insert_probe(trainer.global_step)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Insert the probe into an optimizer that may step within this backward, or a later one that accumulates."""
        for monitored in self._monitored:
            announced = monitored.due is not None
            if monitored.optimizer.update_in_backward and (announced or monitored.clock.rings(trainer.global_step)):
                monitored.insert_probe(trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Remove the probes, and log what they recorded."""
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
        """Draw the figures, and warn of non-finite gradients since the last log."""
        folder = run_folder(trainer)
        for index, monitored in enumerate(self._monitored):
            monitored.count_nonfinite()
            history = [
                (step, figures) for step, figures in self.history if monitored.prefix + "norm_mean/all" in figures
            ]
            if history:
                name = "residual_norm" + (f"_{index}" if len(self._monitored) > 1 else "")
                publish_figure(trainer, folder, name, partial(_draw_residual, history, monitored.prefix))


class Monitored:
    """An optimizer with its probe, which is inserted during steps that log."""

    def __init__(self, optimizer: RoleOptimizer, prefix: str, clock: StepClock) -> None:
        self.optimizer, self.prefix, self.clock = optimizer, prefix, clock
        self.probe = ResidualProbe()
        self.due: int | None = None
        """Next step that logs, once it has been announced."""
        self._nonfinite = optimizer.nonfinite_gradients()

    def insert_probe(self, step: int) -> None:
        self.due = step
        self.optimizer.observer = self.probe

    def count_nonfinite(self) -> int:
        """Count non-finite gradients since the optimizer was built, and warn of new ones."""
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
    """Figures of :class:`OptimizerStateMonitor` by name. Call it on every process."""
    figures = StateReport.measure(optimizers, module).figures()
    every_role = (f"total_bytes_by_role/{role}" for role in (*ROLES, OTHER))
    pool = _pool(sorted({*figures, *every_role}), device)
    pool.update((name, size, 1.0) for name, size in figures.items())
    logged = {name: mean for name, (mean, _) in pool.compute().items()}
    logged["total_bytes_all_processes"] = logged["total_bytes"] * processes
    logged["ratio_to_adamw"] = logged["total_bytes"] / max(1, logged["adamw_bytes"])
    return logged


def pooled_residual(monitored: Monitored, device: torch.device) -> dict[str, float]:
    """Figures of :class:`ResidualNormMonitor` by name. Call it on every process."""
    names, readings = ResidualFigures(monitored.optimizer), monitored.probe.read()
    pool = _pool(names.names, device)
    pool.update(names.figures(readings))
    if readings:
        pool.update([("nonfinite_gradients", monitored.count_nonfinite(), 1.0)])
    return names.logged(pool.compute())


def _pool(names: list[str], device: torch.device) -> Pool:
    """Build a pool on the device that the processes exchange tensors from."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    return Pool(names, dtype).to(device)
