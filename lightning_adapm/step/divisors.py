"""Divisors of directions for kernels: roots of second moments, or averages that take the directions in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators, State
from lightning_adapm.moments.batches import join
from lightning_adapm.moments.second import (
    BlockSecondMoment,
    ElementwiseSecondMoment,
    FactoredSecondMoment,
    NoSecondMoment,
    bias_correction,
)
from lightning_adapm.step.averages import factor
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.moves import Divisors
from lightning_adapm.step.parts import Part


def read_by_kernels(batch: Batch, grads: DeviceGradients, roots: Tensor | None) -> Divisors:
    """Divisors of the direction: from ``roots``, or from averages that take the gradients in."""
    second, number = batch.parts[0].second, batch.step
    if isinstance(second, FactoredSecondMoment):
        return _factored(second, batch.parts, number, grads)
    if isinstance(second, NoSecondMoment):
        return _ones(grads.matrices)
    if isinstance(second, ElementwiseSecondMoment):
        return _elementwise(second, batch.parts, number)
    assert isinstance(second, BlockSecondMoment) and roots is not None
    return Divisors(roots, bias_correction(second.beta2, number), second.eps)


def found_by_torch(batch: Batch, used: list[Tensor]) -> Divisors:
    """Find the divisors of directions ``used`` by torch's operations, where kernels do not update averages in place."""
    second, parts = batch.parts[0].second, batch.parts
    if isinstance(second, ElementwiseSecondMoment) and second.storage.plain and used is batch.grads:
        return _elementwise(second, parts, batch.step)
    if isinstance(second, NoSecondMoment):
        return _ones(Matrices.of(used))
    roots, correction, eps, columns, _ = second.denominators(batch.grads, parts, batch.step, batch.reduction)
    if columns is not None:
        shares, factors = (join(tensors).float().flatten(1).contiguous() for tensors in (roots, columns))
        return Divisors(shares, correction, eps, columns=factors)
    roots = [
        (root if root.dim() else root.expand(*grad.shape[:-2], 1, 1)).contiguous()
        for root, grad in zip(roots, used, strict=True)
    ]
    return Divisors(Matrices.of(roots), correction, eps)


def _elementwise(second_moment: ElementwiseSecondMoment, states: Sequence[State], number: int) -> Divisors:
    """The averages themselves, which the kernel updates with the directions."""
    correction = bias_correction(second_moment.beta2, number)
    return Divisors(matrices_of(states, "exp_avg_sq"), correction, second_moment.eps, second_moment.beta2)


def _ones(directions: Matrices) -> Divisors:
    return Divisors(torch.ones(len(directions.addresses), directions.shape[0], device=directions.like.device), 1.0, 0.0)


def _factored(
    second_moment: FactoredSecondMoment, parts: Sequence[Part], number: int, grads: DeviceGradients
) -> Divisors:
    """Update the averages with the gradients."""
    averages = matrices_of(parts, "exp_avg_sq_row"), matrices_of(parts, "exp_avg_sq_col")
    height = parts[0].shape[-2]
    shares, roots = factor(grads.reading, grads.columns, averages, grads.shape[1:], height, second_moment.beta2)
    return Divisors(shares, bias_correction(second_moment.beta2, number), second_moment.eps, columns=roots)


def matrices_of(states: Sequence[State], key: str) -> Matrices:
    """An entry of some states, as kernels find it."""
    return Matrices.of([state[key] for state in states])


def by_part(divisors: Divisors, parts: int) -> Denominators:
    """Denominators of kernels as tensors by part."""
    roots, correction, eps, beta2, columns, _ = divisors
    assert roots is not None
    by_part = list(roots.tensors) if isinstance(roots, Matrices) else _by_part(roots[..., None], parts)
    by_column = None if columns is None else _by_part(columns[:, None], parts)
    return Denominators(by_part, correction, eps, by_column, squared=beta2 is not None)


def _by_part(values: Tensor, parts: int) -> list[Tensor]:
    """The matrices of each part; this process may hold no row of them."""
    return list(values.unflatten(0, (parts, -1)).unbind())
