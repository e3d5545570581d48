"""Figures drawn at the end of a run. Import this module when drawing, because matplotlib is an optional extra."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_adapm.report.diagnostics import StateReport
from lightning_adapm.report.plan import StateBytes
from lightning_adapm.report.tables import show_bytes

_MIB = 2**20
_KINDS = (("momentum", "tab:blue"), ("second_moment", "tab:orange"), ("other", "tab:gray"))
_RATIO = r"$\Vert G - G R^\top R\Vert_F \,/\, \Vert \hat{M}\Vert_F$"


def state_figure(report: StateReport, name: str) -> Figure:
    """Draw bytes of state by role in MiB, stacked by kind, next to AdamW's.

    Args:
        report: Measured state of the optimizers.
        name: Name of the optimizers in the title.
    """
    figure = _figure(width=max(6.5, 2.5 + 0.9 * len(report.by_role)), height=4.2)
    axes = figure.add_subplot()
    places = np.arange(len(report.by_role))
    _stack(axes, places - 0.21, report.by_role.values(), label=True)
    _stack(axes, places + 0.21, report.adamw.values(), hatch="///", alpha=0.45)
    axes.bar([0], [0], color="lightgray", hatch="///", edgecolor="white", label="AdamW, float32 (hatched)")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.spines["bottom"].set_visible(False)  # it would cover the smallest bars
    axes.set_ylim(*np.array([-0.02, 1.12]) * max(1e-6, axes.dataLim.ymax))
    axes.set_xticks(places, list(report.by_role), rotation=30, ha="right")
    axes.set_xlabel("role")
    axes.set_ylabel("optimizer state per process [MiB]")
    total, reference = report.total.total, report.adamw_total.total
    axes.set_title(f"{name}: {total / _MIB:.2f} MiB, AdamW: {reference / _MIB:.2f} MiB")
    axes.legend()
    return figure


def _stack(axes: Axes, places: np.ndarray, heights: Iterable[StateBytes], label: bool = False, **style: Any) -> None:
    sizes = list(heights)
    bottom = np.zeros(len(sizes))
    for kind, color in _KINDS:
        height = np.array([getattr(size, kind) for size in sizes]) / _MIB
        text = kind.replace("_", " ") if label else None
        axes.bar(places, height, 0.4, bottom, color=color, label=text, edgecolor="white", linewidth=0, **style)
        bottom += height
    for place, top, size in zip(places, bottom, sizes, strict=True):
        text = show_bytes(size.total).replace(" ", "\n")
        axes.annotate(text, (place, top), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=6)


def residual_figure(history: Sequence[tuple[int, Mapping[str, float]]], prefix: str = "") -> Figure:
    """Draw the residual's norm relative to the direction, by role and by layer, over time.

    Args:
        history: Steps that logged, with their figures.
        prefix: Prefix of the figures' names.
    """
    steps = [step for step, _ in history]
    lines = _series(history, f"{prefix}norm_mean/")
    layers = _series(history, f"{prefix}norm_by_layer/")
    figure = _figure(width=11, height=max(4.2, 1.5 + 0.16 * len(layers)))
    by_role, by_layer = figure.subplots(1, 2, width_ratios=(1, 1.15))
    for role, values in lines.items():
        strong = {"color": "black", "linewidth": 2.0} if role == "all" else {}
        by_role.plot(steps, values, marker=".", label="mean of all" if role == "all" else role, **strong)
    by_role.set_xlabel("step")
    by_role.set_ylabel(_RATIO)
    by_role.set_ylim(bottom=0)
    by_role.set_title("by role")
    by_role.legend(fontsize="small")
    by_role.grid(alpha=0.3)

    image = by_layer.imshow(
        np.array(list(layers.values())), aspect="auto", origin="lower", interpolation="none", cmap="viridis"
    )
    by_layer.set_xticks(*_some(steps, 8))
    by_layer.set_yticks(*_some(list(layers), 32), fontsize="small")
    by_layer.set_xlabel("step")
    by_layer.set_ylabel("layer")
    by_layer.set_title("by layer")
    figure.colorbar(image, ax=by_layer, label=_RATIO)
    figure.suptitle("Part of the gradient outside the low-rank momentum")
    return figure


def losses_figure(curves: Mapping[str, Sequence[tuple[int, float, float]]]) -> Figure:
    """Draw validation losses of several runs over time.

    Args:
        curves: Step, seconds and loss of every validation, by the name of the run.
    """
    figure = _figure(width=6.5, height=4.2)
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot([seconds for _, seconds, _ in curve], [loss for *_, loss in curve], marker=".", label=name)
    axes.set_xlabel("seconds of training and validation")
    axes.set_ylabel("validation loss [nats per token]")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _series(history: Sequence[tuple[int, Mapping[str, float]]], prefix: str) -> dict[str, list[float]]:
    """Select figures whose names start with ``prefix``, over time; NaN where a step has none."""
    names = dict.fromkeys(name for _, figures in history for name in figures if name.startswith(prefix))
    return {name.removeprefix(prefix): [figures.get(name, np.nan) for _, figures in history] for name in names}


def _some(labels: Sequence[object], most: int) -> tuple[range, list[str]]:
    """Choose at most ``most`` evenly spaced places, with their labels."""
    places = range(0, len(labels), -(-len(labels) // most))
    return places, [str(labels[place]) for place in places]


def _figure(width: float, height: float) -> Figure:
    # without pyplot, whose state and backend belong to the user
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
