"""Page of a study from its results: losses by learning rate, best ones compared seed by seed; and plots beside it."""

import math
import statistics
from pathlib import Path
from typing import Any

from benchmarks.pages.curves import observed_tables, plot_curves, plot_observed, steps_table
from benchmarks.pages.table import Cell, Table, best, edge_of, plotting, rivals, select, spread, style, tabulate
from benchmarks.studies import Study
from benchmarks.studies.base import Pretraining
from benchmarks.studies.optimizers import missing
from benchmarks.studies.store import Store

STABLE = 0.1
"""A learning rate counts as stable where no seed diverged and the mean loss is this close (nats) to the best."""


def losses_table(table: Table) -> list[str]:
    rates = sorted({lr for cells in table.values() for lr in cells})
    lines = ["| | " + " | ".join(f"lr {lr:g}" for lr in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for label, cells in table.items():
        marked = {lr: f"**{cell}**" if lr == best(cells) else str(cell) for lr, cell in cells.items()}
        lines.append(f"| {label} | " + " | ".join(marked.get(lr, "") for lr in rates) + " |")
    return lines


def best_table(study: Study, table: Table, timed: bool = True) -> list[str]:
    """Each variant at its best learning rate, compared seed by seed with the best of each baseline.

    Args:
        timed: Whether there is a column of seconds.
    """
    others = rivals(study, table)
    counted = any(cells[best(cells)].state is not None for cells in table.values())
    heads = ["best lr", "loss", *(f"minus {label}'s best" for label in others.values())]
    heads += ["stable lr", "largest update / lr", *(["state"] if counted else []), *(["seconds"] if timed else [])]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for label, cells in table.items():
        lr = best(cells)
        cell = cells[lr]
        edge = f" ({tried})" if (tried := edge_of(cells)) else ""
        row = [f"{lr:g}{edge}", f"{cell.mean:.4f}"]
        for rival in others.values():
            row.append("" if rival == label else paired(cell, table[rival][best(table[rival])]))
        stable = [rate for rate, other in cells.items() if other.mean <= cell.mean + STABLE]
        largest = [result["max_update"] for other in cells.values() for result in other.results.values()]
        seconds = statistics.fmean(result["seconds"] for result in cell.results.values())
        worst = "not finite" if None in largest else f"{max(largest):.1f}"
        row += [f"{min(stable):g} to {max(stable):g}" if stable else "none", worst]
        if counted:
            row.append("" if cell.state is None else f"{cell.state:.2%}")
        if timed:
            row.append(f"{seconds:.1f}")
        lines.append(f"| {label} | " + " | ".join(row) + " |")
    return lines


def paired(cell: Cell, rival: Cell) -> str:
    """Mean difference over the seeds that both have; a seed gives both the same initial weights and batches."""
    common = [(loss, rival.losses[seed]) for seed, loss in cell.losses.items() if seed in rival.losses]
    differences = [a - b for a, b in common]
    return spread(differences, "+") if differences and all(map(math.isfinite, differences)) else "not finite"


def crossings(study: Study, table: Table) -> dict[Any, dict[Any, Cell]]:
    """Runs at the best learning rate, by the second crossed option and then by the first, both ascending."""
    assert study.crossed is not None
    columns, rows = study.crossed
    found: dict[Any, dict[Any, Cell]] = {}
    for label, cells in table.items():
        options = study.variants[label][1]
        if columns in options and rows in options:
            found.setdefault(options[rows], {})[options[columns]] = cells[best(cells)]
    return {value: dict(sorted(found[value].items())) for value in sorted(found)}


def crossed_table(study: Study, table: Table) -> list[str]:
    """Mean loss by the values of both options."""
    assert study.crossed is not None
    found = crossings(study, table)
    heads = sorted({value for cells in found.values() for value in cells})
    lines = [f"Loss by `{study.crossed[1]}` (rows) and `{study.crossed[0]}` (columns):", ""]
    lines += ["| | " + " | ".join(map(str, heads)) + " |", "|---" * (len(heads) + 1) + "|"]
    for value, cells in found.items():
        means = (f"{cells[head].mean:.4f}" if head in cells else "" for head in heads)
        lines.append(f"| {value} | " + " | ".join(means) + " |")
    return lines


def plot_crossed(study: Study, table: Table, path: Path) -> None:
    """Loss against one option, a line for each value of the other, baselines level."""
    plt = plotting()
    if plt is None:
        return
    assert study.crossed is not None
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (value, cells) in enumerate(crossings(study, table).items()):
        axes.plot(
            list(cells), [cell.mean for cell in cells.values()], marker="o", ms=3, label=f"{study.crossed[1]} {value}",
            **style(index, "AdaPM"),
        )  # fmt: skip
    for label in rivals(study, table).values():
        axes.axhline(table[label][best(table[label])].mean, color="black", lw=1.2, ls="--", label=label)
    axes.set(xscale="log", xlabel=study.crossed[0], ylabel="validation loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def plot(table: Table, path: Path) -> None:
    """Loss against learning rate as an SVG, where there is matplotlib."""
    plt = plotting()
    if plt is None:
        return
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, (label, cells) in enumerate(table.items()):
        finite = {lr: cell for lr, cell in cells.items() if math.isfinite(cell.mean)}
        losses = [list(cell.losses.values()) for cell in finite.values()]
        errors = [statistics.stdev(x) / math.sqrt(len(x)) if len(x) > 1 else 0.0 for x in losses]
        axes.errorbar(
            list(finite), [statistics.fmean(x) for x in losses], errors, marker="o", ms=3, capsize=2, label=label,
            **style(index, label),
        )  # fmt: skip
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats)")
    rates = sorted({lr for cells in table.values() for lr in cells})
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def opening(name: str, study: Study) -> list[str]:
    """Question, finding and setting."""
    setting, unit = study.setting, study.setting.shape.unit
    windows = "" if unit == "image" else f"x {setting.shape.context} "
    what = f"{setting.shape}; {setting.steps} steps of {setting.batch} {windows}{unit}s"
    return [
        f"# {name}",
        "",
        f"{study.question}",
        "",
        f"**Finding.** {study.finding}",
        "",
        f"{what}, warm-up and cosine to a tenth, weight decay 0.1 on"
        f" everything{', bfloat16 autocast' if setting.bf16 else ''}"
        f"{pretrained(study)}."
        f" Validation loss at the end in nats per {unit}: mean ± standard error (seeds). A seed gives every run"
        " the same initial weights and batches, so differences are taken seed by seed.",
        "",
    ]


def pretrained(study: Study) -> str:
    """Words on the weights that a study starts from; empty where they are random."""
    how = study.pretraining
    if not study.pretrained:
        return ""
    if how == Pretraining():
        return ", from weights pretrained with AdamW on Python sources"
    return (
        f", from weights pretrained with AdamW at {how.lr:g} in {how.steps} such steps on another text"
        f"{' (one model for all seeds, which fix the batches)' if how.once else ''}"
    )


def not_run(study: Study, table: Table) -> list[str]:
    """Rows without results, with the reason where their optimizer is not there."""
    reasons: dict[str, list[str]] = {}
    for label, (kind, _) in study.variants.items():
        if label not in table:
            reasons.setdefault(missing(kind) or "not run", []).append(label)
    lines = [f"- {reason}: {'; '.join(labels)}" for reason, labels in reasons.items()]
    return ["Rows without results:", "", *lines, ""] if lines else []


def section(study: Study, table: Table, timed: bool) -> list[str]:
    """All about one text, with seconds where they are of one processor."""
    page = [*crossed_table(study, table), ""] if study.crossed else []
    page += [*losses_table(table), ""]
    page += ["Bold: each row's best learning rate, chosen on the same seeds for every row. There:", ""]
    page += [*best_table(study, table, timed), ""]
    words = "" if timed else " Seconds are left out, because the runs are of several processors."
    page += [f"Stable: no seed diverged and the mean is within {STABLE} of the row's best.{words}", ""]
    page += not_run(study, table)
    if study.curves:
        page += steps_table(study, table)
    return page + observed_tables(table)


def draw(study: Study, table: Table, image: Path) -> None:
    """Plots of one text, of which the first is ``image``; none without matplotlib."""
    if study.crossed:
        plot_crossed(study, table, image)
    else:
        plot(table, image)
    if study.curves:
        plot_curves(study, table, image.with_name(f"{image.stem}-curves.svg"))
    plot_observed(table, image.with_name(f"{image.stem}-observed.svg"))


def report(name: str, study: Study, store: Store) -> None:
    """Write ``NAME.md`` and, where matplotlib is there, the plots next to the results."""
    if not store.own:
        print(f"{name}: no results yet")
        return
    page, sessions = opening(name, study), dict[str, None]()
    for index, (text, entries) in enumerate(select(study, store).items()):
        table = tabulate(study, entries)
        if not table:
            continue
        processors = {entry.session["hardware"] for entry in entries}
        page += [f"## {text}", "", *section(study, table, timed=len(processors) == 1)]
        draw(study, table, store.path.with_name(f"{name}{index or ''}.svg"))
        sessions |= dict.fromkeys(
            "- {date}, {hardware}, {versions}: `{command}`".format_map(entry.session) for entry in entries
        )
    page += ["## Commands", "", *sessions]
    store.path.parent.mkdir(parents=True, exist_ok=True)
    store.path.with_name(f"{name}.md").write_text("\n".join(page) + "\n")
    print(f"Wrote {store.path.with_name(f'{name}.md')}")
