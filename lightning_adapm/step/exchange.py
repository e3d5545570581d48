"""Exchange between processes whose kernels work on rows of the same matrices, once for many batches.

Kernels take local rows as they take whole matrices, if they are given what other processes have: columns of bases,
whether all rows of a gradient are finite, and sums of squares of columns, and of blocks whose rows lie on several
processes.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.batches import join
from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.moments.second import BlockSecondMoment, FactoredSecondMoment
from lightning_adapm.sharding.collectives import total
from lightning_adapm.step.averages import advance
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.parts import Part
from lightning_adapm.step.reading import Reading
from lightning_adapm.step.refreshing import refreshes

ROUND_NUMEL = 1 << 29
"""Most elements of a process's rows that are read before any of them moves. Products with bases stay, and
gathered bases. Every further round has collectives of its own, for which all processes wait.
"""


def rounds(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Sort batches into those that are read before any of them moves: first all that exchange nothing, then the others.

    What is read of the others is bounded by :data:`ROUND_NUMEL`. Every process sorts them alike.
    """
    alone: list[Batch] = []
    apart: list[Batch] = []
    for batch in batches:
        (alone if batch.parts[0].shard is None else apart).append(batch)
    if alone:
        yield alone
    together, numel = list[Batch](), 0
    for batch in apart:
        added = sum(map(_most_held, batch.parts))
        if together and numel + added > ROUND_NUMEL:
            yield together
            together, numel = [], 0
        together.append(batch)
        numel += added
    if together:
        yield together


def _most_held(part: Part) -> int:
    """Number of elements of a shard on the process that holds most."""
    assert part.shard is not None
    return part.shard.most * part.shard.width


def begin(batches: Sequence[Batch]) -> None:
    """Read the gradients of batches, and complete what was found with what other processes have found."""
    by_scope: defaultdict[Hashable, list[Batch]] = defaultdict(list)
    for batch in batches:
        if batch.parts[0].shard is not None:
            by_scope[batch.reduction.scope].append(batch)
    for together in by_scope.values():
        _gather_bases([batch for batch in together if isinstance(batch.parts[0].first, LowRankMomentum)])
    by_group: defaultdict[Hashable, list[Batch]] = defaultdict(list)
    for batch in chain.from_iterable(by_scope.values()):
        by_group[_group(batch)].append(batch)
    for together in by_group.values():
        _agree(together)


def _gather_bases(batches: Sequence[Batch]) -> None:
    """Give gradients the bases of their momenta, of which processes may keep some columns each."""
    if not batches:
        return
    kept = []
    for batch in batches:
        momentum = batch.parts[0].first
        assert isinstance(momentum, LowRankMomentum)
        kept.append(join(momentum.bases(batch.parts)))
    widths = [batch.parts[0].shape[-1] for batch in batches]
    for batch, right in zip(batches, batches[0].reduction.columns_of(kept, widths), strict=True):
        _grads(batch).right = right


def _agree(batches: Sequence[Batch]) -> None:
    """Read gradients, and find out whether they are finite on all processes, and sums of their columns and blocks."""
    numbers: list[Tensor] = []
    for batch in batches:
        grads = _grads(batch)
        right = grads.right
        grads.read_first(lowrank.sketched(right.float()) if right is not None and refreshes(batch) else right)
        numbers.append((grads.reading.flaws != 0).float())
        if _has_columns(batch):
            numbers.append(grads.columns)
        if _has_blocks(batch):
            numbers.append(_sums_of_blocks(batch))
    found = iter(total(numbers, _group(batches[0])))
    for batch in batches:
        flaws = (next(found) != 0).to(torch.int32)
        _grads(batch).agree(flaws, next(found) if _has_columns(batch) else None)
        if _has_blocks(batch):
            _grads(batch).roots = _roots_of_blocks(batch, next(found))


def _has_columns(batch: Batch) -> bool:
    return isinstance(batch.parts[0].second, FactoredSecondMoment)


def _has_blocks(batch: Batch) -> bool:
    """Ask whether rows of a block with a second moment lie on several processes; a vector is one block."""
    second = batch.parts[0].second
    return isinstance(second, BlockSecondMoment) and (second.blocks is not None or len(batch.parts[0].shape) < 2)


def _sums_of_blocks(batch: Batch) -> Tensor:
    """Sums ``(b, blocks)`` of the squares of each block in this process's rows."""
    squares, shape, shard = _grads(batch).reading.squares, batch.parts[0].shape, batch.parts[0].shard
    if len(shape) < 2:
        return squares
    second = batch.parts[0].second
    assert isinstance(second, BlockSecondMoment) and shard is not None
    rows = pad(squares, (shard.first, shard.size - shard.first - shard.count))
    return rows.unflatten(1, (second.blocks, -1)).sum(dim=-1)


def _roots_of_blocks(batch: Batch, sums: Tensor) -> Tensor:
    """Take the ``sums`` of squares of blocks over all processes into second moments, and return their roots by this
    process's rows, ``(b, m)``.
    """
    part, flaws = batch.parts[0], _grads(batch).reading.flaws
    second, shard = part.second, part.shard
    assert isinstance(second, BlockSecondMoment) and shard is not None
    blocks = sums.shape[1]
    _, roots = advance(
        Reading(sums, flaws, None),
        None,
        None,
        None,
        Matrices.of([each["exp_avg_sq"] for each in batch.parts]),
        torch.Size((blocks, part.shape.numel() // blocks)),  # each block is a row
        None,
        (0.0, second.beta2),
        1.0,
    )
    assert roots is not None
    if len(part.shape) < 2:
        return roots
    rows = roots.repeat_interleave(shard.size // blocks, dim=1)
    return rows[:, shard.first : shard.first + shard.count].contiguous()


def _grads(batch: Batch) -> DeviceGradients:
    assert isinstance(batch.grads, DeviceGradients)
    return batch.grads


def _group(batch: Batch) -> dist.ProcessGroup:
    assert batch.parts[0].layout is not None
    return batch.parts[0].layout.group
