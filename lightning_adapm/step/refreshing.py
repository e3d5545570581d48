"""Refreshes of bases whose gradients kernels read."""

from collections.abc import Sequence

from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.step.averages import weigh
from lightning_adapm.step.bases import sketch
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.reading import Reading, combine, multiplied

TOGETHER_NUMEL = 1 << 23
"""Maximum number of elements of bases that are made orthonormal together, as copies in float64."""

Iterated = tuple[Tensor, Tensor, Tensor]
"""Arguments of :func:`lowrank.refreshed`."""


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
    lefts, beta1 = Matrices.of(momentum.storage.read(states, "exp_avg_l")), momentum.beta1
    if grads.right is None:
        right, sketched = sketch(Matrices.of(momentum.bases(states)))
        grads.read_first(sketched)
        del sketched
    else:
        right = grads.right.float()
    projected, grads.projected = grads.projected, None  # those with the next bases are still to be read
    assert projected is not None
    flaws = grads.reading.flaws
    weights = weigh(projected, lefts, flaws, beta1, reduction)
    del projected
    fresh, inner = reduction.total([combine(grads.matrices, weights, flaws), combine(lefts, weights)])
    shown = lowrank.shows(fresh)
    return fresh.lerp_(combine(Matrices.of([right]), inner.mT), beta1), shown, right


def _settle(found: Sequence[tuple[Batch, Iterated]]) -> None:
    bases = lowrank.refreshed([iterated for _, iterated in found], found[0][0].reduction)
    for (batch, _), basis in zip(found, bases, strict=True):
        assert isinstance(batch.grads, DeviceGradients)
        batch.grads.basis = basis


def moved_lefts(lefts: Matrices, right: Tensor, basis: Tensor, known: Reading) -> Tensor:
    """Left factors ``left right basisᵀ`` under a new ``basis`` in the place of ``right``, both ``(b, r, n)`` in the
    dtype of products; ``(b, m, padded(r))``.
    """
    turned = multiplied(Matrices.of([basis]), right, known)
    return multiplied(lefts, turned[..., : right.shape[-2]], known)
