"""AdaLomo's step by kernels: updates relative to the size of their matrix, without copies of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_adapm.moments.second import ADDED, RelativeSecondMoment
from lightning_adapm.step.averages import factor, relate
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.divisors import matrices_of
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.moves import Divisors, move
from lightning_adapm.step.parts import Part
from lightning_adapm.step.rounding import rounding_of

SMALLEST = 1e-3
"""Lower bound of a matrix's root mean square, by which its updates are scaled."""


def step(batch: Batch, grads: DeviceGradients, group: Mapping[str, Any]) -> None:
    """Take gradients into the second moments of a batch, and move its parameters."""
    parts, matrices, reading = batch.parts, grads.matrices, grads.reading
    m, n = matrices.shape
    second = parts[0].second
    assert isinstance(second, RelativeSecondMoment)
    decay = 1 - second.weight(batch.step)
    shares, roots = factor(reading, grads.columns, _averages(parts), grads.shape[1:], m, decay, ADDED, grads.clock)
    lengths = (relate(matrices, shares, roots, reading.flaws) / (m * n)).sqrt_()
    shares *= (lengths / float(group["clip_threshold"])).clamp_min_(1.0).unsqueeze(-1)
    stacks = matrices.like.dim() == 3
    moved = [matrix for param in batch.params for matrix in (param.unbind() if stacks else (param,))]
    sizes = torch.stack(torch._foreach_norm(moved, 2, torch.float32)) / (m * n) ** 0.5
    move(
        batch.params,
        matrices,
        Divisors(shares, 1.0, 0.0, columns=roots),
        lr=float(group["lr"]),
        decay=parts[0].decay,
        flaws=reading.flaws,
        rounding=rounding_of(parts, batch.step, group),
        rates=sizes.clamp_min_(SMALLEST),
        clock=grads.clock,
    )


def _averages(parts: Sequence[Part]) -> tuple[Matrices | None, Matrices]:
    """Averages by row and by column; a vector is a row, each of whose columns is an entry."""
    if len(parts[0].shape) < 2:
        return None, matrices_of(parts, "exp_avg_sq")
    return matrices_of(parts, "exp_avg_sq_row"), matrices_of(parts, "exp_avg_sq_col")
