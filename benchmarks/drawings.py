"""Pictures of ``docs/how-it-works.md``, computed from the package: ``python -m benchmarks.drawings``."""

from pathlib import Path
from typing import Any

import torch

from benchmarks.optimizer_memory import model
from benchmarks.pages.table import plotting
from lightning_adapm import explain
from lightning_adapm.moments.orthogonal import newton_schulz
from lightning_adapm.moments.policy import DEFAULT_MOMENTUM
from lightning_adapm.report.tables import show_bytes

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
MODEL = "Llama-3-8B"
BETA1 = 0.9
REFRESH = 10
MATRICES = {
    "embedding": (1.2, 0.7),
    "query": (0.7, 0.7),
    "key": (0.3, 0.7),
    "value": (0.3, 0.7),
    "attn_out": (0.7, 0.7),
    "mlp": (1.2, 0.7),
    "lm_head": (1.2, 0.7),
}
"""Height and width of the drawn matrix of each role; not to scale."""
BLUE, PALE = "tab:blue", "#e8e8e8"


def policies(plt: Any) -> Any:
    """Each role's matrix, with what its momentum keeps of it."""
    rows = explain(model(MODEL)).rows
    figure, axes = plt.subplots(figsize=(9.5, 3), layout="constrained")
    left = 0.0
    for role, (height, width) in MATRICES.items():
        policy = DEFAULT_MOMENTUM[role]
        full = policy == "full"
        axes.add_patch(
            plt.Rectangle((left, -height), width, height, facecolor=BLUE if full else PALE, edgecolor="black")
        )
        if policy == "low_rank":
            axes.add_patch(plt.Rectangle((left, -height), 0.07, height, facecolor=BLUE))
            axes.add_patch(plt.Rectangle((left, -0.07), width, 0.07, facecolor=BLUE))
        axes.text(left + width / 2, 0.08, role, ha="center", fontsize=10)
        kept, whole = (
            sum(getattr(row, name).momentum for row in rows if row.role == role) for name in ("bytes", "adamw")
        )
        axes.text(
            left + width / 2,
            -1.35,
            f"{policy}\n{show_bytes(kept)}\nof {show_bytes(whole)}",
            ha="center",
            va="top",
            fontsize=9,
        )
        left += 1.25
    axes.set(xlim=(-0.3, left - 0.25), ylim=(-2.0, 0.3))
    axes.set_aspect("equal")
    axes.axis("off")
    return figure


def payment(plt: Any) -> Any:
    """Share of one gradient that has moved the weight, over the steps that follow it."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    steps = list(range(31))
    average = [1 - BETA1 ** (step + 1) for step in steps]
    paid = [value if step < REFRESH else 1.0 for step, value in enumerate(average)]
    dropped = [value if step < REFRESH else average[REFRESH - 1] for step, value in enumerate(average)]
    axes.step(steps, average, where="post", color="black", label="AdamW's average; inside the subspace")
    axes.step(steps, [1.0] * len(steps), where="post", color=BLUE, label="outside the subspace: at once")
    axes.step(
        steps, paid, where="post", color="tab:orange", label=f"leaves the subspace at step {REFRESH}: the rest at once"
    )
    axes.step(steps, dropped, where="post", color="tab:red", ls="--", label="the same without payout: the rest is lost")
    axes.step(
        steps, [0.0] * len(steps), where="post", color="tab:red", ls=":", label="outside, without the correction: lost"
    )
    axes.set(xlabel="steps after the gradient", ylabel="share of it that moved the weight", ylim=(-0.05, 1.08))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc=(0.4, 0.08))
    return figure


def orthogonalization(plt: Any) -> Any:
    """Singular values before and after the five Newton-Schulz steps."""
    values = torch.logspace(-4, 0, 400, dtype=torch.float64)
    before = values / values.norm()
    after = newton_schulz(values.diag()[None])[0].diagonal()
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    axes.plot(before.tolist(), after.tolist(), color=BLUE)
    axes.axhspan(0.68, 1.21, color=PALE, zorder=0)
    axes.set(
        xscale="log",
        xlabel="singular value of D, relative to the norm of D",
        ylabel="singular value of O",
        ylim=(0, 1.3),
    )
    axes.grid(alpha=0.3)
    return figure


DRAWINGS = {"policies": policies, "payment": payment, "orthogonalization": orthogonalization}


def main() -> None:
    plt = plotting()
    if plt is None:
        raise SystemExit("python -m benchmarks.drawings needs matplotlib: pip install 'lightning-adapm[plot]'")
    PICTURES.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw(plt).savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
