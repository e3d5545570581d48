"""Refreshes of bases whose gradients kernels read."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain

from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.step.averages import squares_of_weights, weigh
from lightning_adapm.step.bases import sketch
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.parts import Part
from lightning_adapm.step.reading import Reading, combine, multiplied

TOGETHER_NUMEL, TOGETHER_OF_SHARDS = 1 << 23, 1 << 24
"""Maximum number of elements of bases that are made orthonormal together, as copies in float64: of whole matrices, and
of shards, whose refreshes also wait for sums over processes.
"""

Iterated = tuple[Tensor, Tensor, Tensor]
"""Arguments of :func:`lowrank.refreshed`."""


def refresh(batches: Sequence[Batch]) -> None:
    """Find the next bases of batches that refresh them.

    Products are computed batch by batch, and summed over processes together. All bases are made orthonormal together,
    because the many small kernels in a row take as long for one batch as for all.
    """
    for together in _groups(filter(refreshes, batches)):
        _refresh(together)


def _groups(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Group batches whose bases are made orthonormal together; the last batch of a group may exceed the bound."""
    together, numel = list[Batch](), 0
    for batch in batches:
        most = TOGETHER_NUMEL if batch.parts[0].shard is None else TOGETHER_OF_SHARDS
        if together and (numel > most or together[0].reduction.scope != batch.reduction.scope):
            yield together
            together, numel = [], 0
        together.append(batch)
        numel += sum(map(_basis_numel, batch.parts))
    if together:
        yield together


def _basis_numel(part: Part) -> int:
    """Number of elements of the bases of a part."""
    assert isinstance(part.first, LowRankMomentum)
    return part.shape[:-2].numel() * part.first.rank * part.shape[-1]


def _refresh(together: Sequence[Batch]) -> None:
    # what no process adds to does not wait for the others
    turns = [together] if together[0].parts[0].shard is not None else [[batch] for batch in together]
    iterated = list(chain.from_iterable(map(_iterated_together, turns)))
    for batch, basis in zip(together, lowrank.refreshed(iterated, together[0].reduction), strict=True):
        assert isinstance(batch.grads, DeviceGradients)
        batch.grads.basis = basis


def _iterated_together(batches: Sequence[Batch]) -> list[Iterated]:
    """:func:`_iterated` of batches, with one collective for each of its sums over processes."""
    tasks = [_iterated(batch) for batch in batches]
    found: list[Iterated] = []
    while len(found) < len(tasks):
        sums: list[Tensor] = []
        for task in tasks:
            try:
                sums += next(task)
            except StopIteration as end:
                found.append(end.value)
        if sums:
            batches[0].reduction.total(sums)
    return found


def refreshes(batch: Batch) -> bool:
    """Whether kernels find the next bases of a batch in this step."""
    part = batch.parts[0]
    return (
        batch.path.whole
        and isinstance(part.first, LowRankMomentum)
        and part.first.due(batch.step)
        and part.first.rank < part.shape[-1]
    )


def _iterated(batch: Batch) -> Generator[list[Tensor], None, Iterated]:
    """:func:`lowrank.iterated_rows` by kernels, whose products round their operands; and the old bases.

    Yields sums over the rows of this process, to be completed with those of the others.
    """
    grads, momentum, states = batch.grads, batch.parts[0].first, batch.parts
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
    lengths = squares_of_weights(projected, lefts, flaws, beta1)
    yield [lengths]
    weights = weigh(projected, lefts, flaws, beta1, lengths)
    del projected
    fresh, inner = combine(grads.matrices, weights, flaws), combine(lefts, weights)
    del weights
    yield [fresh, inner]
    shown = lowrank.any_nonzero(fresh)
    return fresh.lerp_(combine(Matrices.of([right]), inner.mT), beta1), shown, right


def moved_lefts(lefts: Matrices, right: Tensor, basis: Tensor, known: Reading) -> Tensor:
    """Left factors ``left right basisᵀ`` under a new ``basis`` in the place of ``right``, both ``(b, r, n)`` in the
    dtype of products; ``(b, m, padded(r))``.
    """
    turned = multiplied(Matrices.of([basis]), right, known)
    return multiplied(lefts, turned[..., : right.shape[-2]], known)
