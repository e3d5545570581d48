"""AdaLomo's step by kernels: updates relative to the size of their matrix, without copies of it."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_adapm.moments.second import ADDED, RelativeSecondMoment
from lightning_adapm.step.averages import factor, relate
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.moves import Divisors, move
from lightning_adapm.step.rounding import rounding_of

SMALLEST = 1e-3
"""Least root mean square of a matrix that its updates are relative to."""


def step(batch: Batch, grads: DeviceGradients, group: Mapping[str, Any]) -> None:
    """Take gradients into the second moments of a batch, and move its parameters."""
    parts, matrices, reading = batch.parts, grads.matrices, grads.reading
    m, n = matrices.shape
    second = parts[0].second
    assert isinstance(second, RelativeSecondMoment)
    rows, columns = (Matrices.of([part[key] for part in parts]) for key in ("exp_avg_sq_row", "exp_avg_sq_col"))
    decay = 1 - second.weight(batch.step)
    shares, roots = factor(reading, grads.columns, (rows, columns), grads.shape[1:], m, decay, extra=ADDED)
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
    )
