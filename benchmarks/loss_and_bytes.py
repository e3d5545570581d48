"""Loss against bytes of optimizer state, from the studies' results: ``python -m benchmarks.loss_and_bytes``.

It trains nothing. Losses are those in ``results/``, every optimizer at its own best learning rate. Bytes are counted
after one step on made gradients, for the shapes that the study trained.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.costs.memory import state_bytes
from benchmarks.pages.page import RESULTS, provenance, session, table, write
from benchmarks.pages.table import Table, best, plotting, rivals, select, tabulate
from benchmarks.studies import STUDIES, Study
from benchmarks.studies.optimizers import OURS, TRIALS, Parameters, build, missing, resolve
from benchmarks.studies.store import Store

PANELS = {
    "1.8 million parameters, 600 steps, 4 seeds": ("convergence",),
    "86 million parameters, 1600 steps, one to three seeds": ("partial_muon", "at_size"),
}
"""Panels of the picture and the studies whose rows they show."""
NOTES = (
    "Validation loss on text as bytes, minus AdamW's best, in nats per byte; the bars are standard errors over seeds.",
    "State is relative to that of AdamW in float32. Muon without a package's name is PartialMuon with full momentum.",
)


@dataclass(frozen=True)
class Point:
    """One optimizer at its best learning rate.

    ``highest``: several learning rates were tried, and none above this one. ``difference``: mean over seeds of its loss
    minus AdamW's best. ``error``: standard error of the difference, None with one seed. ``state``: bytes relative to
    AdamW's in float32.
    """

    label: str
    study: str
    ours: bool
    lr: float
    highest: bool
    seeds: int
    difference: float
    error: float | None
    state: float


def points(names: Sequence[str], results: Path = RESULTS) -> list[Point]:
    """Rows of studies of one setting, AdamW's best first.

    Trials, which nobody can use, are left out, and so are optimizers of packages that are not installed here.
    """
    found: dict[str, Point] = {}
    for name in names:
        study, store = STUDIES[name], Store(results / f"{name}.json")
        for entries in select(study, store).values():
            rows = tabulate(study, entries)
            rival = rivals(study, rows)["AdamW"]
            labels = [label for label in rows if label == rival or not label.startswith("AdamW")]
            for label in labels:
                kind = study.variants[label][0]
                if kind not in TRIALS and not missing(kind):
                    found.setdefault(label, _point(study, name, rows, label, rival))
    return sorted(found.values(), key=lambda point: not point.label.startswith("AdamW"))


def _point(study: Study, name: str, rows: Table, label: str, rival: str) -> Point:
    lr, other = best(rows[label]), rows[rival][best(rows[rival])].losses
    losses = rows[label][lr].losses
    differences = [losses[seed] - other[seed] for seed in losses if seed in other]
    return Point(
        label=label,
        study=name,
        ours=study.variants[label][0] in OURS,
        lr=lr,
        highest=lr == max(rows[label]) and len(rows[label]) > 1,
        seeds=len(differences),
        difference=statistics.fmean(differences),
        error=statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None,
        state=relative_state(study, label),
    )


def relative_state(study: Study, label: str) -> float:
    """Bytes of a variant's state after one step, relative to two float32 numbers for every parameter."""
    torch.manual_seed(0)
    model = study.setting.shape.build()
    of = Parameters.of(model)
    for param in of.tensors:
        param.grad = torch.randn_like(param)
    optimizer = build(resolve(*study.variants[label]), of, lr=1e-3)
    optimizer.step()
    return state_bytes(optimizer) / sum(8 * param.numel() for param in of.tensors)


def draw(panels: dict[str, list[Point]], file: Path) -> bool:
    """The picture as an SVG; False without matplotlib."""
    plt = plotting()
    if plt is None:
        return False
    figure, all_axes = plt.subplots(1, len(panels), figsize=(12, 5.2), layout="constrained")
    for axes, (title, found) in zip(all_axes, panels.items(), strict=True):
        heights = label_heights(found)
        for point in found:
            color = "tab:blue" if point.ours else "black" if point.label.startswith("AdamW") else "tab:gray"
            axes.errorbar(
                100 * point.state, point.difference, point.error, marker="o", ms=6, capsize=2, color=color, zorder=4
            )
            side, name = 1.15 if point.state < 0.01 else 0.87, point.label.partition(" (")[0]
            axes.text(
                100 * point.state * side, heights[point.label], f"{name} *" if point.highest else name, color=color,
                bbox={"color": "white", "pad": 0.5}, fontsize=8, va="center", ha="left" if side > 1 else "right",
            )  # fmt: skip
        axes.axhline(0, color="black", lw=0.8, ls=":")
        axes.set(xscale="log", title=title, xlabel="optimizer state, % of AdamW's in float32")
        axes.set_xlim(0.4, 140)
        axes.set_xticks([1, 10, 100], ["1", "10", "100"])
        axes.margins(y=0.1)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("validation loss minus AdamW's [nats per byte]\nlower is better")
    figure.supxlabel(
        "Blue: this package. * at the highest learning rate tried. Each at its own best learning rate.", fontsize=8
    )
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True


def label_heights(points: Sequence[Point]) -> dict[str, float]:
    """Heights of labels that do not cover each other; points of much and of little state are apart anyway."""
    gap = 0.04 * (max(point.difference for point in points) - min(point.difference for point in points))
    heights: dict[str, float] = {}
    for much in (False, True):
        last = -math.inf
        for point in sorted(points, key=lambda point: point.difference):
            if (point.state > 0.3) == much:
                heights[point.label] = last = max(point.difference, last + gap)
    return heights


def page(panels: dict[str, list[Point]], line: str, image: str | None) -> str:
    """The numbers of the picture."""
    lines = ["# Loss against bytes of optimizer state", "", line, "", *NOTES, ""]
    for title, found in panels.items():
        rows = [
            [
                point.label,
                f"[{point.study}]({point.study}.md)",
                f"{point.lr:g}{' (the highest tried)' if point.highest else ''}",
                f"{point.difference:+.4f}" + ("" if point.error is None else f" ± {point.error:.4f}"),
                str(point.seeds),
                f"{100 * point.state:.2f} %",
            ]
            for point in found
        ]
        lines += [f"## {title}", "", *table(["", "study", "best lr", "loss minus AdamW's", "seeds", "state"], rows), ""]
    return "\n".join([*lines, *([f"![Loss against bytes]({image})", ""] if image else [])])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_and_bytes", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    panels = {title: points(names) for title, names in PANELS.items()}
    result = session("loss_and_bytes", "cpu") | {
        "panels": {title: [asdict(point) for point in found] for title, found in panels.items()}
    }
    file = args.output / "loss_and_bytes.json"
    drawn = draw(panels, file.with_suffix(".svg"))
    write(file, result, page(panels, provenance(result), file.with_suffix(".svg").name if drawn else None))
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
