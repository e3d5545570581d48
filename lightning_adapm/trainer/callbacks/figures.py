"""The figures drawn at the end of a run. Imports matplotlib, an optional extra: import this module when drawing."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_adapm.report.diagnostics import StateReport
from lightning_adapm.report.plan import StateBytes

_MIB = 2**20
_KINDS = (("momentum", "tab:blue"), ("second_moment", "tab:orange"), ("other", "tab:gray"))
_RATIO = r"$\Vert G - G R^\top R\Vert_F \,/\, \Vert \hat{M}\Vert_F$"


def state_figure(report: StateReport, name: str) -> Figure:
    """Bytes of state by role, stacked by what they are for, each beside AdamW's; in MiB.

    Args:
        report: What the optimizers hold.
        name: What to call them.
    """
    figure = _figure(width=max(6.5, 2.5 + 0.9 * len(report.by_role)), height=4.2)
    axes = figure.add_subplot()
    places = np.arange(len(report.by_role))
    _stack(axes, places - 0.21, report.by_role.values(), label=True)
    _stack(axes, places + 0.21, report.adamw.values(), hatch="///", alpha=0.45)
    axes.bar([0], [0], color="lightgray", hatch="///", edgecolor="white", label="AdamW, float32 (hatched)")
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
        axes.bar(places, height, 0.4, bottom, color=color, label=text, edgecolor="white", linewidth=0.5, **style)
        bottom += height


def residual_figure(history: Sequence[tuple[int, Mapping[str, float]]], prefix: str = "") -> Figure:
    """The residual's norm relative to the direction used: by role over time, and by layer over time.

    Args:
        history: The steps that logged, with the figures they logged.
        prefix: Of the figures' names.
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
    figure.suptitle("What the low-rank momentum does not see of the gradient")
    return figure


def _series(history: Sequence[tuple[int, Mapping[str, float]]], prefix: str) -> dict[str, list[float]]:
    """The figures whose names start with ``prefix``, over time; NaN where there is none."""
    names = dict.fromkeys(name for _, figures in history for name in figures if name.startswith(prefix))
    return {name.removeprefix(prefix): [figures.get(name, np.nan) for _, figures in history] for name in names}


def _some(labels: Sequence[object], most: int) -> tuple[range, list[str]]:
    """Evenly spaced places and their labels, at most ``most`` of them."""
    places = range(0, len(labels), -(-len(labels) // most))
    return places, [str(labels[place]) for place in places]


def _figure(width: float, height: float) -> Figure:
    # no pyplot: its state is the user's, and so is the backend
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
