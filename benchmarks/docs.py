"""Fill the tables of README.md and of pages in docs/ from results: ``python -m benchmarks.docs``."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages import losses
from benchmarks.pages.page import RESULTS, table
from lightning_adapm.report.tables import show_bytes

DOCS = Path(__file__).parents[1] / "docs"
PAGE, PAGE_OF_PROCESSES = DOCS / "benchmarks.md", DOCS / "distributed.md"
README, PAGE_OF_CHOICE = DOCS.parent / "README.md", DOCS / "choosing-an-optimizer.md"
BASE = "AdamW, fused"
"""Row that the others are relative to."""
OURS = ("AdaPM", "AdaPM block", "AdaPM factored")
STEP = (BASE, *OURS, "AdaPM, paper", "AdaPM block, paper")
"""Rows of step times."""
BACKWARD = "AdaPM block, in backward"
TRAINING = (BASE, *OURS, BACKWARD, "AdaPM factored, in backward")
"""Rows of training steps."""
SHARDED = (
    BASE,
    "AdaPM",
    "AdaPM factored",
    "AdaPM block, bases replicated",
    "AdaPM block, bases sharded",
    "AdaPM block, paper",
)
"""Rows of steps on several processes; other pages have those of other optimizers."""

Result = Mapping[str, Any]
Cells = Iterator[tuple[str, list[str]]]
"""Description of a measurement, and the cells of its row."""


def step_times(result: Result) -> Cells:
    """Mean of the fused AdamW in ms, and the means of others relative to it."""
    yield "", _relative(result["rows"], STEP)


def training_times(result: Result) -> Cells:
    """The same for forward, backward and step together."""
    times = result.get("accumulate", 1)
    tokens = f"{result['batch']} x {result['length']} tokens" + (f", {times} times" if times > 1 else "")
    yield f", {tokens}", _relative(result["rows"], TRAINING)


def peaks(result: Result) -> Cells:
    """Peak bytes without and with activation checkpointing."""
    for kind, words in (("plain", ""), ("checkpointing", ", checkpointing")):
        parts = (result["rows"].get(name, {}).get(kind) for name in (BASE, *OURS, BACKWARD))
        yield words, [show_bytes(part["peak"]) if part and "peak" in part else "" for part in parts]


def recipes(result: Result) -> Cells:
    """The limit, peak bytes and tokens per second of a recipe, and of AdamW in its place."""
    base = result["rows"].get(BASE, {}).get("tokens_per_second")
    for name, row in result["rows"].items():
        if "peak" in row:
            speed = row["tokens_per_second"]
            ratio = f"{speed / base:.2f}" if base else ""
            yield f", {name}", [row["limit"], show_bytes(row["peak"]), f"{speed:,.0f}", ratio]


def sharded_steps(result: Result) -> Cells:
    """The mean of the fused AdamW in ms and the means of others relative to it, of the step alone and in training.

    Means are those of the fastest turn, because a single disturbed step can double that of its turn.
    """
    how = f", {result['strategy'].upper()} on {result['processes']}"
    for kind, words in (("step", "step"), ("training", "training step")):
        rows = {name: {"mean_ms": min(row[kind]["turns_ms"])} for name, row in result["rows"].items() if kind in row}
        if rows:
            yield f"{how}, {words}", _relative(rows, SHARDED)


def _relative(rows: Mapping[str, Mapping[str, Any]], names: tuple[str, ...]) -> list[str]:
    base, *others = (rows.get(name, {}).get("mean_ms") for name in names)
    if not base:
        return [""] * len(names)
    return [f"{base:.2f} ms", *("" if mean is None else f"{mean / base:.2f}" for mean in others)]


SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[Result], Cells]]] = {
    "defaults-step_time": (STEP, step_times),
    "h200-step_time": (STEP, step_times),
    "training_time": (TRAINING, training_times),
    "peak_memory": ((BASE, *OURS, BACKWARD), peaks),
    "step_time_sharded": (SHARDED, sharded_steps),
    "h200-step_time_sharded": (SHARDED, sharded_steps),
    "recipe_training": (("limit", "peak", "tokens per second", f"/ {BASE}"), recipes),
}
"""Benchmarks, with the columns of their tables and the cells of a result."""
PAGES = {
    PAGE: ("defaults-step_time", "h200-step_time", "training_time", "peak_memory", "recipe_training"),
    PAGE_OF_PROCESSES: ("h200-step_time_sharded", "step_time_sharded"),
    README: ("losses",),
    PAGE_OF_CHOICE: ("all losses",),
}
"""Pages, with the names of their sections."""


def section(name: str, results: Path = RESULTS) -> str:
    """A row for each result of a benchmark, with a link to its page, or a table of losses."""
    if name in losses.TABLES:
        return losses.section(name, results)
    header, cells = SECTIONS[name]
    rows = []
    for file in sorted(results.glob(f"{name}-*.json")):
        result = json.loads(file.read_text())
        where = result["hardware"].partition(",")[0] if result["device"] == "cuda" else "CPU"
        for words, row in cells(result):
            text = f"{result['model']}, {result['dtype']}{words}, {where}"
            rows.append([f"[{text}](../benchmarks/results/{file.stem}.md)", *row])
    return "\n".join(table(["", *header], rows)) if rows else "Nothing is measured yet."


def filled(text: str, sections: Iterable[str]) -> str:
    """The text of a page with ``sections`` between their marks replaced by the results that there are.

    Raises:
        ValueError: The page lacks a mark.
    """
    for name in sections:
        before, start, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not end:
            raise ValueError(f"the page lacks the marks <!-- {name} --> and <!-- end {name} -->")
        text = f"{before}{start}{section(name)}\n{end}{after}"
    return text


def main() -> None:
    for page, sections in PAGES.items():
        page.write_text(filled(page.read_text(), sections))


if __name__ == "__main__":
    main()
