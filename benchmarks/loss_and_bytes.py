"""Loss against bytes of optimizer state, from the studies' results: ``python -m benchmarks.loss_and_bytes``.

It trains nothing. Losses are those in ``results/``, every optimizer at its own best learning rate. Bytes are those that
a run has counted, or else counted here after one step on made gradients, for the shapes that the study trained.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.costs.memory import state_bytes
from benchmarks.pages.page import RESULTS, provenance, session, table, write
from benchmarks.pages.table import Table, best, edge_of, plotting, rivals, select, tabulate
from benchmarks.studies import STUDIES, Study
from benchmarks.studies.optimizers import TRIALS, Parameters, build, missing, resolve
from benchmarks.studies.store import Store

PANELS = {
    "GPT-2, 124 million parameters, tokens, 1500 steps": ("tokens_gpt2",),
    "Llama, 60 million parameters, tokens, 1500 steps": ("tokens_llama_60m",),
    "Llama, 130 million parameters, tokens, 1500 steps": ("tokens_llama_130m",),
    "GPT-2, 86 million parameters, bytes, 1600 steps": ("partial_muon", "at_size"),
    "Llama, 130 million parameters, finetuned on answers, 225 steps": ("finetune_at_size",),
    "GPT-2, 1.8 million parameters, bytes, 600 steps": ("convergence",),
}
"""Models in the order in which they are worth a look, and the studies whose rows they show."""
ENOUGH, DRAWN = 5, 2
"""The picture has the first models with as many rows, and so many of them."""
VARIED = (
    "low-rank everywhere",
    "more momentum",
    "embedding",
    "but for",
    "attn_out",
    "fast steps",
    "Muon's steps",
    "PartialMuon, compact",
    "refreshed",
    "rank ",
    "float32",
    "all full",
    "betas .9 .999",
    "not corrected",
    "clamp",
    "weight decay",
)
"""Parts of labels of rows that only vary an option: they are in the table, not in the picture."""
COLORS = {"AdamW": "black", "AdaPM": "tab:blue", "PartialMuon": "tab:purple", "": "tab:gray"}
"""By the beginning of a label."""
OWN = "AdaPM", "PartialMuon", "Muon"
"""Beginnings of labels of this package's optimizers."""
NOTES = (
    "Validation loss minus AdamW's best, in nats per byte or, where the model reads tokens, per token. The bars are"
    " standard errors over seeds.",
    "State is relative to that of AdamW in float32. Muon without a package's name is PartialMuon with full momentum.",
)


@dataclass(frozen=True)
class Point:
    """One optimizer at its best learning rate.

    ``edge``: words where no worse learning rate was tried on one side; empty otherwise. ``difference``: mean over seeds
    of its loss minus AdamW's best. ``error``: standard error of the difference, None with one seed. ``state``: bytes
    relative to AdamW's in float32. ``optimizer``: its options, for which the state was counted.
    """

    label: str
    study: str
    lr: float
    edge: str
    seeds: int
    difference: float
    error: float | None
    state: float
    optimizer: dict[str, Any]


def points(names: Sequence[str], known: Mapping[str, float], results: Path = RESULTS) -> list[Point]:
    """Rows of studies of one setting, AdamW's best first.

    Args:
        known: States by :func:`identity`, which are not counted again.

    Trials, which nobody can use, are left out, and so are optimizers whose state is neither known nor can be counted,
    because their package is not installed here.
    """
    found: dict[str, Point] = {}
    for name in names:
        study, store = STUDIES[name], Store(results / f"{name}.json")
        for entries in select(study, store).values():
            rows = tabulate(study, entries)
            if "AdamW" not in rivals(study, rows):
                continue
            rival = rivals(study, rows)["AdamW"]
            labels = [label for label in rows if label == rival or not label.startswith("AdamW")]
            for label in labels:
                state = _state(study, name, label, rows, known)
                if study.variants[label][0] not in TRIALS and state is not None:
                    found.setdefault(label, _point(study, name, rows, label, rival, state))
    return sorted(found.values(), key=lambda point: not point.label.startswith("AdamW"))


def _point(study: Study, name: str, rows: Table, label: str, rival: str, state: float) -> Point:
    lr, other = best(rows[label]), rows[rival][best(rows[rival])].losses
    losses = rows[label][lr].losses
    differences = [losses[seed] - other[seed] for seed in losses if seed in other]
    return Point(
        label=label,
        study=name,
        lr=lr,
        edge="the only one tried" if len(rows[label]) == 1 else edge_of(rows[label]),
        seeds=len(differences),
        difference=statistics.fmean(differences),
        error=statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None,
        state=state,
        optimizer=resolve(*study.variants[label]),
    )


def _state(study: Study, name: str, label: str, rows: Table, known: Mapping[str, float]) -> float | None:
    kind, options = study.variants[label]
    counted = rows[label][best(rows[label])].state
    if counted is None:
        counted = known.get(identity(name, resolve(kind, options)))
    return relative_state(study, label) if counted is None and not missing(kind) else counted


def identity(study: str, optimizer: Mapping[str, Any]) -> str:
    """What a state depends on: a study has one model."""
    return json.dumps([study, optimizer], sort_keys=True)


def counted_before(file: Path) -> dict[str, float]:
    """States in the results of the last time."""
    panels = json.loads(file.read_text())["panels"] if file.exists() else {}
    rows = [row for found in panels.values() for row in found if "optimizer" in row]
    return {identity(row["study"], row["optimizer"]): row["state"] for row in rows}


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
    figure, all_axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5.2), layout="constrained", squeeze=False)
    for axes, (title, found) in zip(all_axes[0], panels.items(), strict=True):
        for point, (x, height) in zip(found, label_places(found), strict=True):
            family = next((family for family in COLORS if point.label.startswith(family)), "")
            color, name = COLORS[family], "AdamW" if family == "AdamW" else point.label.partition(" (")[0]
            axes.errorbar(
                100 * point.state, point.difference, point.error, marker="o", ms=6, capsize=2, color=color, zorder=4
            )
            axes.text(
                100 * x, height, f"{name} *" if point.edge else name, color=color, bbox={"color": "white", "pad": 0.5},
                fontsize=8, va="center", ha="left" if x > point.state else "right", zorder=3.5,
            )  # fmt: skip
        border = front(found)
        states, lowest = zip(*((100 * point.state, point.difference) for point in border), strict=True)
        axes.plot((*states, 1000), (*lowest, lowest[-1]), color="tab:orange", lw=1.5, drawstyle="steps-post", zorder=3)
        axes.axhline(0, color="black", lw=0.8, ls=":")
        axes.set(xscale="log", title=title, xlabel="optimizer state, % of AdamW's in float32")
        axes.set_xlim(0.4, 140)
        axes.set_xticks([1, 10, 100], ["1", "10", "100"])
        axes.margins(y=0.1)
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("validation loss minus AdamW's [nats]\nlower is better")
    figure.supxlabel(
        "Each at its own best learning rate; * no worse one was tried on one side. Blue: AdaPM. Purple: PartialMuon."
        " Orange: the lowest loss with at most so much state.",
        fontsize=8,
    )
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return True


def front(points: Sequence[Point]) -> list[Point]:
    """Points with a lower loss than every one with as little state, by their state."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.state, point.difference)):
        if not found or point.difference < found[-1].difference:
            found.append(point)
    return found


def chosen(panels: Mapping[str, list[Point]]) -> dict[str, list[Point]]:
    """Panels of the picture: the first that have :data:`ENOUGH` rows, without :data:`VARIED` and without optimizers of
    others that are behind at an edge, because another rate may be theirs.
    """
    enough = [title for title, found in panels.items() if len(found) >= ENOUGH]
    return {
        title: [
            point
            for point in panels[title]
            if not any(part in point.label for part in VARIED)
            and (point.difference <= 0 or not point.edge or any(map(point.label.startswith, OWN)))
        ]
        for title in enough[:DRAWN]
    }


def label_places(points: Sequence[Point]) -> list[tuple[float, float]]:
    """Where labels begin or end, as state and height: left of points, or right of those with least state.

    They cover neither each other nor points with a little less state. Points of much and of little state are apart
    anyway.
    """
    gap = 0.04 * (max(point.difference for point in points) - min(point.difference for point in points))
    heights: dict[str, float] = {}
    for much in (False, True):
        last = -math.inf
        for point in sorted(points, key=lambda point: point.difference):
            if (point.state > 0.3) == much:
                heights[point.label] = last = max(point.difference, last + gap)
    places = []
    for point in points:
        height = heights[point.label]
        in_the_way = [
            other.state
            for other in points
            if point.state / 2 < other.state <= point.state and abs(other.difference - height) < gap / 2
        ]
        places.append(
            (1.15 * point.state if point.state < 0.01 else 0.87 * min(in_the_way, default=point.state), height)
        )
    return places


def page(panels: dict[str, list[Point]], line: str, image: str | None) -> str:
    """The numbers of the picture."""
    lines = ["# Loss against bytes of optimizer state", "", line, "", *NOTES, ""]
    for title, found in panels.items():
        rows = [
            [
                point.label,
                f"[{point.study}]({point.study}.md)",
                f"{point.lr:g}{f' ({point.edge})' if point.edge else ''}",
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
    parser.add_argument("--recount", action="store_true", help="count all states, also those of the last time")
    args = parser.parse_args()
    file = args.output / "loss_and_bytes.json"
    known = {} if args.recount else counted_before(file)
    found = {title: points(names, known) for title, names in PANELS.items()}
    panels = {title: rows for title, rows in found.items() if rows}
    result = session("loss_and_bytes", "cpu") | {
        "panels": {title: [asdict(point) for point in rows] for title, rows in panels.items()}
    }
    drawn = draw(chosen(panels), file.with_suffix(".svg"))
    write(file, result, page(panels, provenance(result), file.with_suffix(".svg").name if drawn else None))
    print(file.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
