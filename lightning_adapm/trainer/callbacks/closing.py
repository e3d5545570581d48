"""The table at the end of a run: what was reached, with how many bytes of optimizer state, beside AdamW."""

import json
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_adapm.report.diagnostics import StateReport
from lightning_adapm.report.tables import show_bytes, show_saving
from lightning_adapm.trainer.callbacks.run import optimizer_name, run_folder, write_file

RESULT_FILE = "result.json"
ADAMW = "AdamW"


@dataclass(frozen=True)
class RunResult:
    """What one run came to; :data:`RESULT_FILE` holds these fields.

    Args:
        optimizer: Class name of the optimizer, joined by `` + `` if there are several.
        lr: Its peak learning rate, of the first parameter group.
        val_loss: Last validation loss; None without one.
        momentum_bytes: Bytes of momentum held at the end, on one process.
        state_bytes: Bytes of all optimizer state held at the end, on one process.
        adamw_momentum_bytes: What ``torch.optim.AdamW`` would hold in float32.
        adamw_state_bytes: What ``torch.optim.AdamW`` would hold in float32.
        steps: Optimizer steps taken.
        seconds: Wall-clock time of training and its validations.
        trainable_parameters: Numbers trained.
        data: The data module's ``fingerprint``; None if it has none.
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

    @property
    def ppl(self) -> float | None:
        """Perplexity, the exponential of the validation loss in nats."""
        return None if self.val_loss is None else math.exp(min(self.val_loss, 700.0))

    def to_json(self) -> str:
        """The fields and ``ppl`` as JSON, in which a loss that is not finite is null."""
        values = asdict(self) | {"ppl": self.ppl}
        return json.dumps({k: _finite(v) for k, v in values.items()}, indent=2) + "\n"

    @classmethod
    def read(cls, path: Path) -> "RunResult":
        """Read a :data:`RESULT_FILE`.

        Raises:
            ValueError: It is not one.
        """
        known = {field.name for field in fields(cls)}
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{key: value for key, value in values.items() if key in known})
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not the result of a run: {error}") from error

    def differences(self, other: "RunResult") -> str:
        """What makes two runs incomparable, in words; empty if nothing does."""
        pairs = {
            name: (getattr(self, name), getattr(other, name)) for name in ("steps", "trainable_parameters", "data")
        }
        return ", ".join(f"{name} {theirs} and not {ours}" for name, (ours, theirs) in pairs.items() if ours != theirs)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def find_adamw(result: RunResult, where: str | None) -> tuple[RunResult | None, str]:
    """A real run of AdamW to compare with, and where it is; or None, and why there is none.

    Args:
        result: The run that just ended.
        where: A :data:`RESULT_FILE`, or a folder: the newest one below it that compares.
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


def closing_table(result: RunResult, adamw: RunResult | None) -> Table:
    """The run, and beside it AdamW: with the figures of a real run, or else with computed bytes and no loss.

    The bytes are a process's: those of a real run on another number of processes that share them are computed, too.
    """
    table = Table(title=f"{result.optimizer}: {result.steps} steps in {result.seconds:.0f} s", box=SIMPLE_HEAD)
    table.title_justify = "left"
    momentum, state = result.adamw_momentum_bytes, result.adamw_state_bytes
    if adamw and adamw.adamw_state_bytes == state:  # otherwise its processes held another share of the parameters
        momentum, state = adamw.momentum_bytes, adamw.state_bytes
    rows = [
        ("", result.optimizer, ADAMW, "Saved"),
        ("validation loss", _number(result.val_loss), _number(adamw.val_loss) if adamw else "not run", ""),
        ("perplexity", _number(result.ppl), _number(adamw.ppl) if adamw else "not run", ""),
        (
            "momentum",
            show_bytes(result.momentum_bytes),
            show_bytes(momentum),
            show_saving(result.momentum_bytes, momentum),
        ),
        (
            "all optimizer state",
            show_bytes(result.state_bytes),
            show_bytes(state),
            show_saving(result.state_bytes, state),
        ),
    ]
    columns = 2 if result.optimizer == ADAMW else 4  # nothing to compare with itself
    for index, header in enumerate(rows[0][:columns]):
        table.add_column(header, justify="right" if index else "left")
    for row in rows[1:]:
        table.add_row(*row[:columns])
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if value < 1e4 else f"{value:.3g}"


class ClosingTable(L.Callback):
    """Prints what a fit came to, and writes it as ``result.json`` into the run's folder.

    Validation loss and perplexity, bytes of momentum and of all optimizer state (measured), and the same for AdamW: its
    bytes are computed, its loss comes from a real run or is not there.

    Args:
        compare_with: ``result.json`` of a run of AdamW, or a folder that holds some: the newest one that took as many
            steps, trains as many parameters and read the same data is shown.
        compare_command: The command that makes this run, shown while there is none.
        monitor: Name under which the validation loss is logged, in nats.
    """

    def __init__(
        self, compare_with: str | None = None, compare_command: str | None = None, monitor: str = "val_loss"
    ) -> None:
        self.compare_with, self.compare_command, self.monitor = compare_with, compare_command, monitor
        self.result: RunResult | None = None
        """Of the last fit, once it has ended."""
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.result = None
        self._started = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the measurements, and write them."""
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
        )
        folder = run_folder(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_file(folder, RESULT_FILE, self.result.to_json().encode())

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the table, below the progress bar where that comes before this callback."""
        if stage != "fit" or self.result is None or not trainer.is_global_zero:
            return
        adamw, where = (None, "") if self.result.optimizer == ADAMW else find_adamw(self.result, self.compare_with)
        console = get_console()
        console.print(closing_table(self.result, adamw))
        if note := _note(self.result, adamw, where, self.compare_command):
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def _note(result: RunResult, adamw: RunResult | None, where: str, command: str | None) -> str:
    """Where AdamW's column is from."""
    if result.optimizer == ADAMW:
        return ""
    if adamw is not None:
        return f"{ADAMW}: a real run with lr {adamw.lr:g}, {where}"
    reason = f" ({where})" if where else ""
    how = f"; to run it:\n  {command}" if command else ""
    return f"{ADAMW}: bytes computed for float32, loss not run{reason}{how}"
