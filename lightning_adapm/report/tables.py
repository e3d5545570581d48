"""Tables of bytes for people: the plan by role or by piece, optimizers side by side."""

import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_adapm.report.diagnostics import role_label
from lightning_adapm.report.plan import Row, StateBytes
from lightning_adapm.roles.piece import UNMATCHED


def show_bytes(size: float) -> str:
    """A number of bytes for people: ``"12.3 MiB"``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB" if size < 1024 else f"{size / 1024:.2f} TiB"


def show_saving(held: int, reference: int) -> str:
    """How much smaller ``held`` is, in per cent; a dash without a reference."""
    if not reference:
        return "-"
    return f"{round(100 * (1 - held / reference), 1) + 0.0:.1f} %"  # + 0.0: not "-0.0 %"


def show_count(number: int) -> str:
    """A number of parameters for people: ``"1.5 B"``."""
    if number < 1000:
        return str(number)
    power = min(3, (len(str(number)) - 1) // 3)
    size = number / 1000**power
    return f"{size:,.{size < 100:d}f} {' KMB'[power]}"


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


def summary_table(lines: list[Line], by: str, max_rows: int, optimizer: str = "AdaPM") -> Table:
    """The lines, at most ``max_rows`` of them, and their sum, under the name of an optimizer."""
    total = Line(
        "total",
        sum(line.parameters for line in lines),
        (),
        (),
        sum((line.bytes for line in lines), StateBytes()),
        sum((line.adamw for line in lines), StateBytes()),
    )
    table = Table(title=f"{optimizer}: optimizer state", box=SIMPLE_HEAD, show_footer=True, title_justify="left")
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


def pieces_table(rows: Iterable[Row]) -> Table:
    """One line per piece of a parameter: what it is, why, and what that costs."""
    rows = list(rows)
    table = Table(box=SIMPLE_HEAD, show_footer=True)
    total = sum((row.bytes.total for row in rows), 0)
    feet = {"Parameter": "total", "Shape": show_count(sum(row.numel for row in rows)), "State": show_bytes(total)}
    for header in ("Parameter", "Shape", "Rows", "Role", "Why", "Momentum", "Rank", "State"):
        table.add_column(header, feet.get(header, ""), justify="right" if header in ("Rank", "State") else "left")
    for row in rows:
        shape, rank = " x ".join(map(str, row.shape)), "" if row.rank is None else str(row.rank)
        role = row.role if row.role == UNMATCHED else role_label(row.role)
        table.add_row(
            Text(row.name), shape, row.rows, role, Text(row.why), row.policy, rank, show_bytes(row.bytes.total)
        )
    return table


def comparison_table(totals: Mapping[str, StateBytes], references: Mapping[str, StateBytes]) -> Table:
    """Optimizers side by side: their bytes, and what each saves of every reference."""
    table = Table(box=SIMPLE_HEAD)
    for index, header in enumerate(("", *totals)):
        table.add_column(header, justify="right" if index else "left")
    for field in ("momentum", "second_moment", "other", "total"):
        sizes = (show_bytes(getattr(size, field)) for size in totals.values())
        table.add_row(field.replace("_", " "), *sizes, end_section=field == "other")
    for name, reference in references.items():
        table.add_row(f"saved of {name}", *(show_saving(size.total, reference.total) for size in totals.values()))
    return table


def as_text(table: Table) -> str:
    """A table as plain text of its own width, whatever the terminal's."""
    file = io.StringIO()
    Console(file=file, width=10_000).print(table)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())
