"""Tables of bytes: a plan by role or by piece, and optimizers side by side."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_adapm.report.diagnostics import StateReport, role_label
from lightning_adapm.report.memory import StepBytes
from lightning_adapm.report.plan import Row, StateBytes
from lightning_adapm.roles.piece import UNMATCHED

if TYPE_CHECKING:  # rich is imported when a table is drawn
    from rich.table import Table


def show_bytes(size: float) -> str:
    """Format a number of bytes: ``"12.3 MiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB" if size < 1024 else f"{size / 1024:.2f} TiB"


def read_bytes(words: str) -> int:
    """Read a number of bytes such as ``"24GiB"``.

    Raises:
        ValueError: There is no number, or no such unit.
    """
    for power, unit in enumerate(("KiB", "MiB", "GiB", "TiB"), 1):
        if words.endswith(unit):
            try:
                return int(float(words.removesuffix(unit)) * 1024**power)
            except ValueError:
                break
    raise ValueError(f"a size must be a number with KiB, MiB, GiB or TiB, such as 24GiB, but got {words!r}")


def show_saving(held: int, reference: int) -> str:
    """Format how much smaller ``held`` is than ``reference``, in percent; a dash where the reference is 0."""
    if not reference:
        return "-"
    return f"{round(100 * (1 - held / reference), 1) + 0.0:.1f} %"  # + 0.0: not "-0.0 %"


def show_count(number: int) -> str:
    """Format a number of parameters: ``"1.5 B"``."""
    if number < 1000:
        return str(number)
    power = min(3, (len(str(number)) - 1) // 3)
    size = number / 1000**power
    return f"{size:,.{size < 100:d}f} {' KMB'[power]}"


@dataclass(frozen=True)
class Line:
    """Sum of some rows of a plan: those of one role, or of one piece of a parameter."""

    label: str
    parameters: int
    policies: tuple[str, ...]
    ranks: tuple[int, ...]
    bytes: StateBytes
    adamw: StateBytes

    @classmethod
    def of(cls, label: str, rows: list[Row]) -> Line:
        """Sum up ``rows`` under a label."""
        return cls(
            label,
            sum(row.numel for row in rows),
            tuple(dict.fromkeys(row.policy for row in rows)),
            tuple(sorted({row.rank for row in rows if row.rank is not None})),
            sum((row.bytes for row in rows), StateBytes()),
            sum((row.adamw for row in rows), StateBytes()),
        )


def summarize(rows: Iterable[Row], by: Literal["role", "parameter"] = "role") -> list[Line]:
    """Sum up a plan's rows in the plan's order: one line for each role, or for each piece of a parameter."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(role_label(row.role) if by == "role" else f"{row.name} ({row.role})", []).append(row)
    return [Line.of(label, together) for label, together in lines.items()]


def summary_table(lines: list[Line], by: str, max_rows: int, optimizer: str = "AdaPM") -> Table:
    """Draw lines and their sum as a table.

    Args:
        lines: Lines of :func:`summarize`.
        by: What a line stands for, the header of the first column.
        max_rows: Maximum number of lines in the table. A last row counts the others; the sum includes them.
        optimizer: Name in the title.
    """
    from rich.text import Text

    total = Line(
        "total",
        sum(line.parameters for line in lines),
        (),
        (),
        sum((line.bytes for line in lines), StateBytes()),
        sum((line.adamw for line in lines), StateBytes()),
    )
    table = new_table(title=f"{optimizer}: optimizer state", show_footer=True)
    footer = [total.label, *_cells(total)]
    headers = (by.capitalize(), "Params", "Momentum", "Rank", "State", "AdamW", "Saved")
    for index, (header, foot) in enumerate(zip(headers, footer, strict=True)):
        table.add_column(header, foot, justify="left" if index in (0, 2) else "right", overflow="fold")
    for line in lines[:max_rows]:
        table.add_row(Text(line.label), *_cells(line))
    if len(lines) > max_rows:
        table.add_row(f"... {len(lines) - max_rows} more")
    table.caption = (
        f"Saved of AdamW's momentum in float32: {show_saving(total.bytes.momentum, total.adamw.momentum)},"
        f" of all its state: {show_saving(total.bytes.total, total.adamw.total)}"
    )
    table.caption_justify = "left"
    return table


def new_table(**options: Any) -> Table:
    """An empty table in the style of all tables of this package."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    return Table(box=SIMPLE_HEAD, title_justify="left", **options)


def _cells(line: Line) -> tuple[str, ...]:
    ranks = dict.fromkeys(line.ranks[:1] + line.ranks[-1:])
    return (
        show_count(line.parameters),
        ", ".join(line.policies),
        " to ".join(map(str, ranks)),
        show_bytes(line.bytes.total),
        show_bytes(line.adamw.total),
        show_saving(line.bytes.total, line.adamw.total),
    )


def markdown_table(report: StateReport, optimizer: str) -> str:
    """Write measured bytes of state by role, next to AdamW's, as a table in Markdown.

    Args:
        report: Measured state of the optimizers.
        optimizer: Header of their columns.
    """
    header = ("role", f"{optimizer}: momentum", "second moment", "other", "all", "AdamW, float32", "saved")
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    roles = [(role, held, report.adamw[role]) for role, held in report.by_role.items()]
    for role, held, adamw in (*roles, ("total", report.total, report.adamw_total)):
        sizes = (held.momentum, held.second_moment, held.other, held.total, adamw.total)
        cells = (role, *map(show_bytes, sizes), show_saving(held.total, adamw.total))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pieces_table(rows: Iterable[Row]) -> Table:
    """Draw one row for each piece of a parameter: its role, the reason for that role, and its bytes.

    Where some updates are orthogonal, a column says which.
    """
    from rich.text import Text

    rows = list(rows)
    differs = any(row.orthogonal for row in rows)
    table = new_table(show_footer=True)
    total = sum((row.bytes.total for row in rows), 0)
    feet = {"Parameter": "total", "Shape": show_count(sum(row.numel for row in rows)), "State": show_bytes(total)}
    for header in ("Parameter", "Shape", "Rows", "Role", "Why", *["Update"] * differs, "Momentum", "Rank", "State"):
        table.add_column(header, feet.get(header, ""), justify="right" if header in ("Rank", "State") else "left")
    for row in rows:
        shape, rank = " x ".join(map(str, row.shape)), "" if row.rank is None else str(row.rank)
        role = row.role if row.role == UNMATCHED else role_label(row.role)
        update = ["orthogonal" if row.orthogonal else "Adam's"] * differs
        table.add_row(
            Text(row.name), shape, row.rows, role, Text(row.why), *update, row.policy, rank, show_bytes(row.bytes.total)
        )
    return table


def comparison_table(totals: Mapping[str, StateBytes], references: Mapping[str, StateBytes]) -> Table:
    """Draw optimizers side by side.

    Args:
        totals: Bytes by the optimizer's name, one column each.
        references: Bytes by the name of a reference. A last row for each shows what every optimizer saves of it.
    """
    table = new_table()
    for index, header in enumerate(("", *totals)):
        table.add_column(header, justify="right" if index else "left")
    for field in ("momentum", "second_moment", "other", "total"):
        sizes = (show_bytes(getattr(size, field)) for size in totals.values())
        table.add_row(field.replace("_", " "), *sizes, end_section=field == "other")
    for name, reference in references.items():
        table.add_row(f"saved of {name}", *(show_saving(size.total, reference.total) for size in totals.values()))
    return table


def step_table(step: StepBytes) -> Table:
    """Draw the memory of a training step, part by part."""
    table = new_table(show_footer=True)
    table.add_column("Part", "total")
    table.add_column("Bytes", show_bytes(step.total), justify="right")
    for part, size in vars(step).items():
        table.add_row(part, show_bytes(size))
    return table


def as_text(table: Table, width: int | None = None) -> str:
    """Render a table as plain text, of its own width or at most ``width`` characters wide."""
    from rich.console import Console

    file = io.StringIO()
    Console(file=file, width=width or 10_000).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
