"""Refreshes of bases whose gradients kernels read."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.batches import join
from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.step.averages import Refreshed, weigh
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.reading import combine

TOGETHER_NUMEL = 1 << 23
"""Maximum number of elements of bases that are made orthonormal together, as copies in float64."""

Iterated = tuple[Tensor, Tensor, Tensor]
"""Arguments of :func:`lowrank.refreshed`."""


def _joined(values: list[Tensor]) -> Tensor:
    """Values as one ``(b, ...)`` batch in float32; a copy, but of a single one."""
    return join(values).float()


def refresh(batches: Sequence[Batch]) -> None:
    """Find the next bases of batches that refresh them.

    Products are computed batch by batch. All bases are made orthonormal together, because the many small kernels in a
    row take as long for one batch as for all.
    """
    found: list[tuple[Batch, Iterated]] = []
    for batch in batches:
        if not refreshes(batch):
            continue
        if found and found[0][0].reduction.scope != batch.reduction.scope:
            _settle(found)
            found = []
        found.append((batch, _iterated(batch)))
        if sum(right.numel() for _, (_, _, right) in found) > TOGETHER_NUMEL:
            _settle(found)
            found = []
    if found:
        _settle(found)


def refreshes(batch: Batch) -> bool:
    """Whether kernels find the next bases of a batch in this step."""
    part = batch.parts[0]
    return (
        batch.path.whole
        and isinstance(part.first, LowRankMomentum)
        and part.first.due(batch.step)
        and part.first.rank < part.shape[-1]
    )


def _iterated(batch: Batch) -> Iterated:
    """:func:`lowrank.iterated_rows` by kernels, whose products round their operands; and the old bases."""
    grads, momentum, states, reduction = batch.grads, batch.parts[0].first, batch.parts, batch.reduction
    assert isinstance(grads, DeviceGradients) and isinstance(momentum, LowRankMomentum)
    right = _joined(momentum.bases(states)) if grads.right is None else grads.right.float()
    lefts, beta1 = Matrices.of(momentum.storage.read(states, "exp_avg_l")), momentum.beta1
    if grads.projected is None:
        grads.read_first(lowrank.sketched(right))
    projected, grads.projected = grads.projected, None  # those with the next bases are still to be read
    assert projected is not None
    flaws = grads.reading.flaws
    weights = weigh(projected, lefts, flaws, beta1, reduction)
    del projected
    sums = [combine(grads.matrices, weights, flaws), combine(lefts, weights, torch.zeros_like(flaws))]
    fresh, inner = reduction.total(sums)
    return torch.baddbmm(fresh, inner, right, beta=1 - beta1, alpha=beta1), lowrank.shows(fresh), right


def _settle(found: Sequence[tuple[Batch, Iterated]]) -> None:
    bases = lowrank.refreshed([iterated for _, iterated in found], found[0][0].reduction)
    for (batch, _), basis in zip(found, bases, strict=True):
        assert isinstance(batch.grads, DeviceGradients)
        batch.grads.basis = basis


def moved_lefts(lefts: list[Tensor], right: Tensor, basis: Tensor, payout: float) -> Refreshed:
    """Left factors under a new ``basis`` in the place of ``right``, both ``(b, r, n)``."""
    held = _joined(lefts)
    if len(lefts) == 1:  # a view of what is to change
        held = held.clone()
    return Refreshed(held, lowrank.move_left(held, right, basis), payout)
