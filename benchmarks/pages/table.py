"""Results as a table: variants by learning rate by seed, and what its parts have in common."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.studies import Study
from benchmarks.studies.optimizers import resolve
from benchmarks.studies.store import Entry, Store


@dataclass(frozen=True)
class Cell:
    """Runs of one variant at one learning rate, by seed."""

    results: dict[int, dict[str, Any]]

    @property
    def losses(self) -> dict[int, float]:
        return {seed: math.inf if r["diverged"] else r["val_loss"] for seed, r in sorted(self.results.items())}

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values())

    @property
    def state(self) -> float | None:
        """Bytes of the optimizer's state relative to AdamW's in float32; None for runs that did not count them."""
        return next((result["state"] for result in self.results.values() if "state" in result), None)

    def __str__(self) -> str:
        diverged = sum(map(math.isinf, self.losses.values()))
        return f"{diverged} of {len(self.losses)} diverged" if diverged else spread(self.losses.values())


Table = dict[str, dict[float, Cell]]
"""Label to learning rate to runs."""


def spread(values: Iterable[float], sign: str = "") -> str:
    """Mean, its standard error, and of how many."""
    values = list(values)
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.4f}{error} ({len(values)})"


def select(study: Study, store: Store) -> dict[str, list[Entry]]:
    """The study's runs among those known, by text; of a text only where the study's own file has runs."""
    texts: dict[str, list[Entry]] = {entry.run["text"]: [] for entry in store.own.values()}
    wanted = [study.setting_of(label).identity for label in study.variants]
    for entry in store.known.values():
        pretrained = bool(entry.run["setting"]["start"])
        if pretrained == study.pretrained and setting_of(entry) in wanted and entry.run["text"] in texts:
            texts[entry.run["text"]].append(entry)
    return {text: entries for text, entries in texts.items() if entries}


def setting_of(entry: Entry) -> dict[str, Any]:
    """Setting of a result, without the name of its initial weights."""
    return {**entry.run["setting"], "start": None}


def tabulate(study: Study, entries: list[Entry]) -> Table:
    """Variants in the study's order; those without any run are left out."""
    table: Table = {}
    for label, variant in study.variants.items():
        wanted = json.loads(json.dumps(resolve(*variant))), study.setting_of(label).identity
        cells: dict[float, Cell] = {}
        for entry in entries:
            if (entry.run["optimizer"], setting_of(entry)) == wanted:
                cells.setdefault(entry.run["lr"], Cell({})).results[entry.run["seed"]] = entry.result
        if cells:
            table[label] = dict(sorted(cells.items()))
    return table


def best(cells: Mapping[float, Cell]) -> float:
    """The learning rate with the lowest mean, among those with the most seeds."""
    most = max(len(cell.results) for cell in cells.values())
    return min((lr for lr, cell in cells.items() if len(cell.results) == most), key=lambda lr: cells[lr].mean)


def edge_of(cells: Mapping[float, Cell]) -> str:
    """Words for a best learning rate with no worse one on one side; empty where there is one on both, or no other."""
    lr = best(cells)
    if len(cells) == 1:
        return ""
    worse = [other for other in cells if _is_worse(cells[other], cells[lr])]
    if not any(other > lr for other in worse):
        return "the highest tried" if lr == max(cells) else "none worse above"
    if not any(other < lr for other in worse):
        return "the lowest tried" if lr == min(cells) else "none worse below"
    return ""


def _is_worse(cell: Cell, than: Cell) -> bool:
    """Whether a cell has the higher loss, in the seeds that both have."""
    common = cell.losses.keys() & than.losses.keys()
    return sum(cell.losses[seed] for seed in common) > sum(than.losses[seed] for seed in common)


def rivals(study: Study, table: Table) -> dict[str, str]:
    """Label with the lowest loss for each baseline."""
    found = {}
    for name, labels in study.baselines.items():
        there = [label for label in labels if label in table]
        if there:
            found[name] = min(there, key=lambda label: table[label][best(table[label])].mean)
    return found


def plotting() -> Any:
    """``matplotlib.pyplot``, writing files that do not change by themselves; None where it is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    return plt


def style(index: int, label: str) -> dict[str, Any]:
    """Style of a row's line; other optimizers than AdaPM are dashed."""
    colors = plotting().get_cmap("tab20")
    return {"color": colors(index % 20), "lw": 1.2, "ls": "-" if label.startswith("AdaPM") else "--"}
