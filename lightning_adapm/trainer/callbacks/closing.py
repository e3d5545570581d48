"""The table at the end of a run: the loss reached and the bytes of optimizer state, compared with other runs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from lightning_adapm.report.diagnostics import StateReport
from lightning_adapm.report.tables import new_table, show_bytes, show_saving
from lightning_adapm.trainer.callbacks.run import optimizer_name, publish_figure, run_folder, write_file

if TYPE_CHECKING:  # rich is imported when a table is drawn
    from matplotlib.figure import Figure
    from rich.table import Table

RESULT_FILE = "result.json"
ADAMW = "AdamW"


@dataclass(frozen=True)
class RunResult:
    """Outcome of one run; :data:`RESULT_FILE` holds these fields.

    Args:
        optimizer: Class name of the optimizer; several names are joined by `` + ``.
        lr: Peak learning rate of the first parameter group.
        val_loss: Last validation loss; None without a validation.
        momentum_bytes: Bytes of momentum held at the end, on one process.
        state_bytes: Bytes of all optimizer state held at the end, on one process.
        adamw_momentum_bytes: Bytes of momentum that ``torch.optim.AdamW`` would hold in float32.
        adamw_state_bytes: Bytes of all state that ``torch.optim.AdamW`` would hold in float32.
        steps: Optimizer steps taken.
        seconds: Wall-clock time of training and its validations.
        trainable_parameters: Number of trainable elements.
        data: The data module's ``fingerprint``; None if it has none.
        curve: Step, seconds and validation loss of every validation.
    """

    optimizer: str
    lr: float
    val_loss: float | None
    momentum_bytes: int
    state_bytes: int
    adamw_momentum_bytes: int
    adamw_state_bytes: int
    steps: int
    seconds: float
    trainable_parameters: int
    data: str | None = None
    curve: Sequence[tuple[int, float, float]] = ()

    @property
    def ppl(self) -> float | None:
        """Perplexity, the exponential of the validation loss in nats."""
        return None if self.val_loss is None else math.exp(min(self.val_loss, 700.0))

    def to_json(self) -> str:
        """Format the fields and ``ppl`` as JSON; a loss that is not finite becomes null."""
        values = asdict(self) | {"ppl": self.ppl}
        return json.dumps({k: _finite(v) for k, v in values.items()}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """Read a :data:`RESULT_FILE`.

        Raises:
            ValueError: The file is not the result of a run.
        """
        known = {field.name for field in fields(cls)}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{key: value for key, value in values.items() if key in known})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the result of a run: {error}") from error

    def differences(self, other: RunResult) -> str:
        """Name what makes two runs incomparable; empty if they compare."""
        pairs = {
            name: (getattr(self, name), getattr(other, name)) for name in ("steps", "trainable_parameters", "data")
        }
        return ", ".join(f"{name} {theirs} and not {ours}" for name, (ours, theirs) in pairs.items() if ours != theirs)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_adamw(result: RunResult, where: str | None) -> tuple[RunResult | None, str]:
    """Find a run of AdamW to compare with.

    Args:
        result: The run that just ended.
        where: A :data:`RESULT_FILE`, or a folder whose newest comparable one is used.

    Returns:
        The result and its path, or None and the reason.
    """
    if where is None:
        return None, ""
    root = Path(where).expanduser()
    files = [root] if root.is_file() else sorted(root.rglob(RESULT_FILE), key=lambda file: -file.stat().st_mtime)
    reasons = []
    for file in files:
        try:
            other = RunResult.read(file)
        except ValueError as error:
            reasons.append(str(error))
            continue
        if other.optimizer != ADAMW:
            reasons.append(f"{file} is a run of {other.optimizer}")
        elif difference := result.differences(other):
            reasons.append(f"{file} does not compare: {difference}")
        else:
            return other, str(file)
    return None, reasons[0] if reasons else f"there is no {RESULT_FILE} in {where}"


def find_others(result: RunResult, where: str | None) -> list[RunResult]:
    """Find the newest comparable run of each optimizer but AdamW and the run's own, in a folder or in no folder."""
    root = None if where is None else Path(where).expanduser()
    files = [] if root is None or root.is_file() else root.rglob(RESULT_FILE)
    newest: dict[str, RunResult] = {}
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        try:
            other = RunResult.read(file)
        except ValueError:
            continue
        if other.optimizer not in (ADAMW, result.optimizer) and not result.differences(other):
            newest[other.optimizer] = other
    return list(newest.values())


def closing_table(result: RunResult, adamw: RunResult | None, others: Sequence[RunResult] = ()) -> Table:
    """Draw a run next to others and to AdamW, with the figures of a real run or else with computed bytes and no loss.

    Bytes are those of one process. They are computed as well where the real run divided its state among another number
    of processes.
    """
    table = new_table(title=f"{result.optimizer}: {result.steps} steps in {result.seconds:.0f} s")
    momentum, state = result.adamw_momentum_bytes, result.adamw_state_bytes
    if adamw and adamw.adamw_state_bytes == state:  # otherwise each process held another share
        momentum, state = adamw.momentum_bytes, adamw.state_bytes
    runs = [result, *others]
    real = (_number(adamw.val_loss), _number(adamw.ppl), f"{adamw.seconds:.0f}") if adamw else ("not run",) * 3
    rows = [
        ("validation loss", [_number(run.val_loss) for run in runs], real[0], ""),
        ("perplexity", [_number(run.ppl) for run in runs], real[1], ""),
        (
            "momentum",
            [show_bytes(run.momentum_bytes) for run in runs],
            show_bytes(momentum),
            show_saving(result.momentum_bytes, momentum),
        ),
        (
            "all optimizer state",
            [show_bytes(run.state_bytes) for run in runs],
            show_bytes(state),
            show_saving(result.state_bytes, state),
        ),
    ]
    if others:
        rows.append(("seconds", [f"{run.seconds:.0f}" for run in runs], real[2], ""))
    compared = slice(2 if result.optimizer != ADAMW else 0)  # nothing to compare with itself
    table.add_column("")
    for header in (*(run.optimizer for run in runs), *(ADAMW, "Saved")[compared]):
        table.add_column(header, justify="right")
    for name, own, *theirs in rows:
        table.add_row(name, *own, *theirs[compared])
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 1e4 else f"{value:.3g}"


class ClosingTable(L.Callback):
    """Print the outcome of a fit, and write it as ``result.json`` into the run's folder.

    The table shows validation loss, perplexity, and measured bytes of momentum and of all optimizer state. AdamW's
    column has the figures of a real run; without one, its bytes are computed and its loss is left out. Where there are
    runs of other optimizers, each has a column, and ``losses.png`` shows the validation losses of all over time.

    Args:
        compare_with: ``result.json`` of a run of AdamW, or a folder with runs of any optimizers. The newest run of each
            with as many steps, as many trainable parameters and the same data is shown.
        compare_command: Command that makes such a run, shown while there is none.
        monitor: Name under which the validation loss is logged, in nats.
    """

    def __init__(
        self, compare_with: str | None = None, compare_command: str | None = None, monitor: str = "val_loss"
    ) -> None:
        self.compare_with, self.compare_command, self.monitor = compare_with, compare_command, monitor
        self.result: RunResult | None = None
        """Outcome of the last fit; None until it has ended."""
        self._started = 0.0
        self._curve: list[tuple[int, float, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.result, self._curve = None, []
        self._started = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the loss and when it was reached."""
        loss = trainer.callback_metrics.get(self.monitor)
        if loss is not None and math.isfinite(loss) and not trainer.sanity_checking:
            self._curve.append((trainer.global_step, round(time.monotonic() - self._started, 2), float(loss)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the optimizers' state, and write the outcome."""
        report = StateReport.measure(trainer.optimizers, pl_module)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        loss = trainer.callback_metrics.get(self.monitor)
        fingerprint = getattr(getattr(trainer, "datamodule", None), "fingerprint", None)
        self.result = RunResult(
            optimizer=optimizer_name(trainer),
            lr=float(groups[0].get("initial_lr", groups[0]["lr"])) if groups else 0.0,
            val_loss=None if loss is None else float(loss),
            momentum_bytes=report.total.momentum,
            state_bytes=report.total.total,
            adamw_momentum_bytes=report.adamw_total.momentum,
            adamw_state_bytes=report.adamw_total.total,
            steps=trainer.global_step,
            seconds=time.monotonic() - self._started,
            trainable_parameters=sum(p.numel() for p in pl_module.parameters() if p.requires_grad),
            data=None if fingerprint is None else str(fingerprint),
            curve=self._curve,
        )
        folder = run_folder(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        write_file(folder, RESULT_FILE, self.result.to_json().encode())
        adamw, _ = find_adamw(self.result, self.compare_with)
        runs = [run for run in (adamw, *find_others(self.result, self.compare_with), self.result) if run and run.curve]
        if len(runs) > 1:
            publish_figure(trainer, folder, "losses", partial(_draw_losses, runs))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the table; it follows the progress bar where that callback comes first."""
        if stage != "fit" or self.result is None or not trainer.is_global_zero:
            return
        from rich import get_console

        adamw, where = (None, "") if self.result.optimizer == ADAMW else find_adamw(self.result, self.compare_with)
        console = get_console()
        console.print(closing_table(self.result, adamw, find_others(self.result, self.compare_with)))
        if note := _note(self.result, adamw, where, self.compare_command):
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def _draw_losses(runs: Sequence[RunResult]) -> Figure:
    from lightning_adapm.trainer.callbacks.figures import losses_figure

    return losses_figure({f"{run.optimizer}, lr {run.lr:g}": run.curve for run in runs})


def _note(result: RunResult, adamw: RunResult | None, where: str, command: str | None) -> str:
    """Source of AdamW's column."""
    if result.optimizer == ADAMW:
        return ""
    if adamw is not None:
        return f"{ADAMW}: a real run with lr {adamw.lr:g}, {where}"
    reason = f" ({where})" if where else ""
    how = f"; to run it:\n  {command}" if command else ""
    return f"{ADAMW}: bytes computed for float32, loss not run{reason}{how}"
