"""Curves of runs by steps, what was read and seconds, steps to a baseline's loss, and observed figures."""

import itertools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.pages.table import Table, best, plotting, rivals, spread, style
from benchmarks.studies import Study
from benchmarks.studies.observing import FIGURES
from benchmarks.studies.setting import Setting

Point = list[float]
"""Step, loss and, in later results, seconds of training."""

PARTS = (0.0, 0.1, 0.5, 0.6, 1.0)
"""Parts of a run, over which figures are averaged."""


def reached(curve: list[Point], loss: float) -> float | None:
    """The step at which a curve is first at ``loss`` or below, interpolated; None where it never is."""
    before = None
    for step, value, *_ in curve:
        if value is not None and value <= loss:
            if before is None or before[1] is None:
                return step
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = step, value
    return None


def steps_table(study: Study, table: Table) -> list[str]:
    """Steps to the final loss of each baseline's best, seed by seed, relative to the baseline's steps."""
    lines = []
    for rival in rivals(study, table).values():
        goal = table[rival][best(table[rival])]
        total = study.setting_of(rival).steps
        lines += [
            f"Steps to where {rival} ends after {total}, as a multiple of them (each row at its best learning rate; of"
            " the seeds that get there):",
            "",
            "| | steps of the run | multiple | seeds that get there |",
            "|---|---|---|---|",
        ]
        for label, cells in table.items():
            results = cells[best(cells)].results
            common = [seed for seed, loss in goal.losses.items() if seed in results and math.isfinite(loss)]
            steps = [reached(results[seed]["curve"], goal.losses[seed] + 5e-5) for seed in common]
            there = [step / total for step in steps if step is not None]
            shown = spread(there) if there else "never"
            lines.append(f"| {label} | {study.setting_of(label).steps} | {shown} | {len(there)} of {len(common)} |")
        lines.append("")
    return lines


def mean_curve(results: Mapping[int, dict[str, Any]], setting: Setting) -> dict[str, list[float]]:
    """Over the seeds: loss against steps, bytes or tokens read and, where all have them, seconds.

    The curve ends where the first one diverged.
    """
    curves = [result["curve"] for result in results.values()]
    found: dict[str, list[float]] = {"loss": [], "steps": [], "read": [], "seconds": []}
    for points in zip(*curves, strict=False):
        if any(point[1] is None for point in points):
            break
        timed = all(len(point) > 2 for point in points)
        found["loss"].append(statistics.fmean(point[1] for point in points))
        found["steps"].append(points[0][0])
        found["read"].append(points[0][0] * setting.batch * setting.shape.context)
        found["seconds"].append(statistics.fmean(point[2] for point in points) if timed else math.nan)
    return found


def plot_curves(study: Study, table: Table, path: Path) -> None:
    """Loss against steps, what was read, seconds and state as an SVG, every row at its best learning rate.

    The last panel is left out where no run has counted its state.
    """
    plt = plotting()
    if plt is None:
        return
    chosen = {label: cells[best(cells)] for label, cells in table.items()}
    counted = any(cell.state is not None for cell in chosen.values())
    figure, panels = plt.subplots(1, 3 + counted, figsize=(14 + 4 * counted, 5), sharey=True, layout="constrained")
    for index, (label, cell) in enumerate(chosen.items()):
        curve = mean_curve(cell.results, study.setting_of(label))
        for axes, unit in zip(panels, ("steps", "read", "seconds"), strict=False):
            axes.plot(curve[unit], curve["loss"], label=f"{label}, {best(table[label]):g}", **style(index, label))
        if cell.state is not None and math.isfinite(cell.mean):
            panels[3].plot([100 * cell.state], [cell.mean], marker="o", **style(index, label))
    labels = "steps", f"{study.setting.shape.unit}s read", "seconds of training per run"
    for axes, label in zip(panels, (*labels, "state at the end, % of AdamW's in float32"), strict=False):
        axes.set(xlabel=label, yscale="log")
        axes.grid(alpha=0.3, which="both")
    if counted:
        panels[3].set_xscale("log")
    panels[0].set_ylabel("validation loss (nats)")
    panels[0].legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def observed(table: Table) -> dict[str, list[dict[str, Any]]]:
    """Observations of each row at its best learning rate, seed by seed; empty without any."""
    kept = {label: cells[best(cells)].results.values() for label, cells in table.items()}
    runs = {
        label: [result["observed"] for result in results if "observed" in result] for label, results in kept.items()
    }
    return {label: found for label, found in runs.items() if found}


def plot_observed(table: Table, path: Path, role: str = "mlp") -> None:
    """Draw a panel for each figure of one role as an SVG, if there are observations and matplotlib."""
    runs, plt = observed(table), plotting()
    if plt is None or not runs:
        return
    figure, panels = plt.subplots(1, len(FIGURES), figsize=(15, 5), layout="constrained")
    for axes, (name, words) in zip(panels, FIGURES.items(), strict=True):
        for index, (label, found) in enumerate(runs.items()):
            series = [(one["steps"], one["roles"].get(role, {}).get(name, [])) for one in found]
            means = [statistics.fmean(at) for at in zip(*(values for _, values in series), strict=False)]
            if means:
                axes.plot(series[0][0][: len(means)], means, label=label, **style(index, label))
        axes.set_title(words, fontsize=8)
        axes.set_xlabel(f"steps ({role})")
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=6)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def observed_tables(table: Table) -> list[str]:
    """Tables of observations by role; empty without any."""
    runs = observed(table)
    roles = list(dict.fromkeys(role for found in runs.values() for one in found for role in one["roles"]))
    page: list[str] = []
    for figure, words in FIGURES.items():
        shown = [role for role in roles if any(figure in o["roles"].get(role, {}) for r in runs.values() for o in r)]
        if not shown:
            continue
        parts = " / ".join(f"{first:.0%} to {last:.0%}" for first, last in itertools.pairwise(PARTS))
        page += [f"{words}, in the parts {parts} of the run:", "", "| | " + " | ".join(shown) + " |"]
        page += ["|---" * (len(shown) + 1) + "|"]
        for label, found in runs.items():
            cells = [" / ".join(averages(found, role, figure)) for role in shown]
            page.append(f"| {label} | " + " | ".join(cells) + " |")
        page.append("")
    return page


def averages(runs: list[dict[str, Any]], role: str, figure: str) -> list[str]:
    """Mean of a figure over parts of runs and over seeds; empty where it was not observed."""
    found: list[list[float]] = [[] for _ in PARTS[1:]]
    for one in runs:
        values = one["roles"].get(role, {}).get(figure, [])
        for step, value in zip(one["steps"], values, strict=False):
            part = sum(step > share * one["steps"][-1] for share in PARTS[1:-1])
            found[part].append(value)
    return [f"{statistics.fmean(values):.2f}" for values in found if values]
