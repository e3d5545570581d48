"""The table at the start of a run: what the optimizer's state will be."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_summary import get_human_readable_count
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_adapm.callbacks.run import show_bytes, show_saving
from lightning_adapm.diagnostics import role_label
from lightning_adapm.optim import AdaPM
from lightning_adapm.optim.tasks import shares_basis
from lightning_adapm.planner import Row, StateBytes, plan

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """Pieces of a plan taken together, by role or by parameter."""

    label: str
    parameters: int
    policies: tuple[str, ...]
    ranks: tuple[int, ...]
    bytes: StateBytes
    adamw: StateBytes

    @classmethod
    def of(cls, label: str, rows: list[Row]) -> "Line":
        """The sum of ``rows``."""
        return cls(
            label,
            sum(row.numel for row in rows),
            tuple(dict.fromkeys(row.policy for row in rows)),
            tuple(sorted({row.rank for row in rows if row.rank is not None})),
            sum((row.bytes for row in rows), StateBytes()),
            sum((row.adamw for row in rows), StateBytes()),
        )


def summarise(rows: Iterable[Row], by: Literal["role", "parameter"] = "role") -> list[Line]:
    """A plan's rows as lines, in the plan's order: one for each role, or for each piece of a parameter."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(role_label(row.role) if by == "role" else f"{row.name} ({row.role})", []).append(row)
    return [Line.of(label, together) for label, together in lines.items()]


def summary_table(lines: list[Line], by: str, max_rows: int) -> Table:
    """The lines, at most ``max_rows`` of them, and their sum."""
    total = Line(
        "total",
        sum(line.parameters for line in lines),
        (),
        (),
        sum((line.bytes for line in lines), StateBytes()),
        sum((line.adamw for line in lines), StateBytes()),
    )
    table = Table(title="AdaPM: optimizer state", box=SIMPLE_HEAD, show_footer=True, title_justify="left")
    footer = [total.label, *_cells(total)]
    headers = (by.capitalize(), "Params", "Momentum", "Rank", "State", "AdamW", "Saved")
    for index, (header, foot) in enumerate(zip(headers, footer, strict=True)):
        table.add_column(header, foot, justify="left" if index in (0, 2) else "right", overflow="fold")
    for line in lines[:max_rows]:
        table.add_row(line.label, *_cells(line))
    if len(lines) > max_rows:
        table.add_row(f"... {len(lines) - max_rows} more")
    table.caption = (
        f"Saved of AdamW's momentum in float32: {show_saving(total.bytes.momentum, total.adamw.momentum)},"
        f" of all its state: {show_saving(total.bytes.total, total.adamw.total)}"
    )
    table.caption_justify = "left"
    return table


def _cells(line: Line) -> tuple[str, ...]:
    ranks = dict.fromkeys(line.ranks[:1] + line.ranks[-1:])
    return (
        get_human_readable_count(line.parameters).strip(),
        ", ".join(line.policies),
        " to ".join(map(str, ranks)),
        show_bytes(line.bytes.total),
        show_bytes(line.adamw.total),
        show_saving(line.bytes.total, line.adamw.total),
    )


def _sharding_note(optimizer: AdaPM) -> str:
    """What the bytes are of, and where the bases are, if parameters are sharded."""
    for group in optimizer.param_groups:
        layouts = (optimizer.placement(param).layout for param in group["params"])
        sharded = next((layout for layout in layouts if layout is not None and len(layout.spans) > 1), None)
        if sharded is not None:
            where = "shared out" if shares_basis(sharded, group["basis"]) else "on every process"
            return f"Bytes of this process, one of {len(sharded.spans)}; bases of the low-rank momentum: {where}"
    return ""


class OptimizerSummary(L.Callback):
    """Prints AdaPM's plan when a fit starts: parameters, momentum policy, rank, and bytes of state beside AdamW's.

    Says nothing of other optimizers, whose state is not known before the first step.

    Args:
        by: ``"role"`` for a line per role, ``"parameter"`` for a line per parameter (of a fused weight: per piece).
        max_rows: The most lines to print; the last one counts the others.

    Raises:
        MisconfigurationException: An option that is not one of these.
    """

    def __init__(self, by: Literal["role", "parameter"] = "role", max_rows: int = 50) -> None:
        if by not in ("role", "parameter"):
            raise MisconfigurationException(f"by must be 'role' or 'parameter', but got {by!r}")
        if not isinstance(max_rows, int) or max_rows < 1:
            raise MisconfigurationException(f"max_rows must be an int >= 1, but got {max_rows!r}")
        self.by, self.max_rows = by, max_rows

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table of every AdaPM optimizer, on the first process."""
        if not trainer.is_global_zero:
            return
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, AdaPM):
                get_console().print(summary_table(summarise(plan(optimizer), self.by), self.by, self.max_rows))
                if note := _sharding_note(optimizer):
                    get_console().print(note)
            else:
                _log.debug("OptimizerSummary: the state of %s is not known before it steps", type(optimizer).__name__)
