"""From results to a page: losses by learning rate, best ones compared seed by seed, a plot."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.optimizers import resolve
from benchmarks.store import Entry, Store
from benchmarks.studies import Study

STABLE = 0.1
"""A learning rate counts as stable where no seed diverged and the mean loss is this close (nats) to the best."""


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
    setting = json.loads(json.dumps(dataclasses.asdict(study.setting)))
    texts: dict[str, list[Entry]] = {entry.run["text"]: [] for entry in store.own.values()}
    for entry in store.known.values():
        found = dict(entry.run["setting"])
        if study.pretrained and found["start"]:
            found["start"] = None
        if found == setting and bool(entry.run["setting"]["start"]) == study.pretrained and entry.run["text"] in texts:
            texts[entry.run["text"]].append(entry)
    return {text: entries for text, entries in texts.items() if entries}


def tabulate(study: Study, entries: list[Entry]) -> Table:
    """Variants in the study's order; those without any run are left out."""
    table: Table = {}
    for label, variant in study.variants.items():
        wanted = json.loads(json.dumps(resolve(*variant)))
        cells: dict[float, Cell] = {}
        for entry in entries:
            if entry.run["optimizer"] == wanted:
                cells.setdefault(entry.run["lr"], Cell({})).results[entry.run["seed"]] = entry.result
        if cells:
            table[label] = dict(sorted(cells.items()))
    return table


def best(cells: Mapping[float, Cell]) -> float:
    """The learning rate with the lowest mean, among those with the most seeds."""
    most = max(len(cell.results) for cell in cells.values())
    return min((lr for lr, cell in cells.items() if len(cell.results) == most), key=lambda lr: cells[lr].mean)


def losses_table(table: Table) -> list[str]:
    rates = sorted({lr for cells in table.values() for lr in cells})
    lines = ["| | " + " | ".join(f"lr {lr:g}" for lr in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for label, cells in table.items():
        marked = {lr: f"**{cell}**" if lr == best(cells) else str(cell) for lr, cell in cells.items()}
        lines.append(f"| {label} | " + " | ".join(marked.get(lr, "") for lr in rates) + " |")
    return lines


def best_table(study: Study, table: Table) -> list[str]:
    """Each variant at its best learning rate, compared seed by seed with the best of each baseline."""
    rivals = {}
    for name, labels in study.baselines.items():
        there = [label for label in labels if label in table]
        if there:
            rivals[name] = min(there, key=lambda label: table[label][best(table[label])].mean)
    heads = ["best lr", "loss", *(f"minus {label}'s best" for label in rivals.values())]
    lines = [
        "| | " + " | ".join([*heads, "stable lr", "largest update / lr", "seconds"]) + " |",
        "|---" * (len(heads) + 4) + "|",
    ]
    for label, cells in table.items():
        lr = best(cells)
        cell = cells[lr]
        edge = " (the highest tried)" if lr == max(cells) and len(cells) > 1 else ""
        row = [f"{lr:g}{edge}", f"{cell.mean:.4f}"]
        for rival in rivals.values():
            row.append("" if rival == label else paired(cell, table[rival][best(table[rival])]))
        stable = [rate for rate, other in cells.items() if other.mean <= cell.mean + STABLE]
        largest = [result["max_update"] for other in cells.values() for result in other.results.values()]
        seconds = statistics.fmean(result["seconds"] for result in cell.results.values())
        worst = "not finite" if None in largest else f"{max(largest):.1f}"
        row += [f"{min(stable):g} to {max(stable):g}" if stable else "none", worst, f"{seconds:.1f}"]
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return lines


def paired(cell: Cell, rival: Cell) -> str:
    """Mean difference over the seeds that both have; a seed gives both the same initial weights and batches."""
    common = [(loss, rival.losses[seed]) for seed, loss in cell.losses.items() if seed in rival.losses]
    differences = [a - b for a, b in common]
    return spread(differences, "+") if differences and all(map(math.isfinite, differences)) else "not finite"


def plot(table: Table, path: Path) -> bool:
    """Loss against learning rate as an SVG; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none"})
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (label, cells) in enumerate(table.items()):
        finite = {lr: cell for lr, cell in cells.items() if math.isfinite(cell.mean)}
        losses = [list(cell.losses.values()) for cell in finite.values()]
        errors = [statistics.stdev(x) / math.sqrt(len(x)) if len(x) > 1 else 0.0 for x in losses]
        style = "o--" if label.startswith("Adam") and not label.startswith("AdaPM") else "o-"
        axes.errorbar(
            list(finite), [statistics.fmean(x) for x in losses], errors, fmt=style, ms=3, lw=1.2, capsize=2,
            color=plt.get_cmap("tab20")(index % 20), label=label,
        )  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per byte)")
    rates = sorted({lr for cells in table.values() for lr in cells})
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def report(name: str, study: Study, store: Store) -> None:
    """Write ``NAME.md`` and, where matplotlib is there, ``NAME.svg`` beside the results."""
    setting = study.setting
    kind = "Llama-like" if setting.shape.llama else "GPT-2-like"
    page = [
        f"# {name}",
        "",
        f"{study.question}",
        "",
        f"**Finding.** {study.finding}",
        "",
        f"A {kind} decoder: {setting.shape.layers} layers, width {setting.shape.width}, {setting.shape.n_head} heads,"
        f" {setting.shape.n_query_groups or setting.shape.n_head} of keys and values; {setting.steps} steps of"
        f" {setting.batch} x {setting.shape.context} bytes, warm-up and cosine to a tenth, weight decay 0.1 on"
        f" everything{', bfloat16 autocast' if setting.bf16 else ''}"
        f"{', from weights pretrained with AdamW on Python sources' if study.pretrained else ''}."
        " Validation loss at the end in nats per byte: mean ± standard error (seeds). A seed gives every run the same"
        " initial weights and batches, so differences are taken seed by seed.",
        "",
    ]
    sessions: dict[str, None] = {}
    for index, (text, entries) in enumerate(select(study, store).items()):
        table = tabulate(study, entries)
        if not table:
            continue
        page += [f"## {text}", "", *losses_table(table), ""]
        page += ["Bold: each row's best learning rate, chosen on the same seeds for every row. There:", ""]
        page += [*best_table(study, table), ""]
        page += [f"Stable: no seed diverged and the mean is within {STABLE} of the row's best.", ""]
        image = store.path.with_name(f"{name}{index or ''}.svg")
        if plot(table, image) or image.exists():
            page += [f"![validation loss by learning rate]({image.name})", ""]
        sessions |= dict.fromkeys(
            "- {date}, {hardware}, {versions}: `{command}`".format_map(entry.session) for entry in entries
        )
    page += ["## Commands", "", *sessions]
    store.path.parent.mkdir(parents=True, exist_ok=True)
    store.path.with_name(f"{name}.md").write_text("\n".join(page) + "\n")
    print(f"Wrote {store.path.with_name(f'{name}.md')}")
