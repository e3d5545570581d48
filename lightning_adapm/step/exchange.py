"""Exchange between processes whose kernels work on rows of the same matrices, once for many batches.

Kernels take local rows as they take whole matrices, if they are given what other processes have: columns of bases,
whether all rows of a gradient are finite, and sums of squares of columns, and of blocks whose rows lie on several
processes.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.batches import join
from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.moments.second import BlockSecondMoment, FactoredSecondMoment
from lightning_adapm.sharding.collectives import Pending, begin_and_wait, total
from lightning_adapm.step.averages import advance
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.parts import Part
from lightning_adapm.step.reading import Reading
from lightning_adapm.step.refreshing import refreshes

ROUND_NUMEL = 1 << 29
"""Most elements of a process's rows whose products with bases stay, and gathered bases, from a round's readings to its
moves. Every further round has collectives of its own, for which all processes wait.
"""
_ALIGNED = 4
"""Multiple at which the flaws of a batch begin: kernels are compiled for the alignment of what they read."""


def rounds(batches: Iterable[Batch]) -> Iterator[list[Batch]]:
    """Sort batches into those that are read before any of them moves: first all that no other process holds rows of,
    then the others, in the order in which they move.

    A round of the others has at most :data:`ROUND_NUMEL` elements. Every process sorts them alike.
    """
    alone: list[Batch] = []
    apart: list[Batch] = []
    for batch in batches:
        (alone if batch.parts[0].shard is None else apart).append(batch)
    if alone:
        yield alone
    together, numel = list[Batch](), 0
    for batch in sorted(apart, key=_turn):
        added = sum(map(_most_held, batch.parts)) if batch.parts[0].first.has_basis else 0
        if together and numel + added > ROUND_NUMEL:
            yield together
            together, numel = [], 0
        together.append(batch)
        numel += added
    if together:
        yield together


def _turn(batch: Batch) -> tuple[bool, int]:
    """Key of the order in which batches move.

    Matrices that processes exchange come first, the smallest of them before all others, since nothing is there yet to
    be worked on meanwhile. What exchanges nothing is worked on while the last matrices come back.
    """
    return not batch.parts[0].second.whole_matrices, sum(part.shape.numel() for part in batch.parts)


def _most_held(part: Part) -> int:
    """Number of elements of a shard on the process that holds most."""
    assert part.shard is not None
    return part.shard.most * part.shard.width


def begin(batches: Sequence[Batch]) -> None:
    """Read the gradients of batches, and complete what was found with what other processes have found.

    Gradients without bases are read while those of the others are gathered, and these while the next ones are.
    """
    apart = [batch for batch in batches if batch.parts[0].shard is not None]
    gathered = [_gather_basis(batch) for batch in apart if isinstance(batch.parts[0].first, LowRankMomentum)]
    for batch in apart:
        if not isinstance(batch.parts[0].first, LowRankMomentum):
            _read(batch)
    for read in gathered:
        read()
    by_group: defaultdict[Hashable, list[Batch]] = defaultdict(list)
    for batch in apart:
        by_group[_group(batch)].append(batch)
    for together in by_group.values():
        _agree(together)


def _gather_basis(batch: Batch) -> Callable[[], None]:
    """Begin to gather the bases of momenta, of which processes may keep some columns each.

    Returns:
        A function that waits for the bases and reads the gradients with them.
    """
    momentum = batch.parts[0].first
    assert isinstance(momentum, LowRankMomentum)
    kept, width = join(momentum.bases(batch.parts)), batch.parts[0].shape[-1]
    planned, gathered = batch.reduction.gather_columns([kept], [width])
    pending = Pending(planned) if planned else None
    if pending is not None:
        begin_and_wait(pending, None)

    def read() -> None:
        if pending is not None:
            begin_and_wait(None, pending)
        (_grads(batch).right,) = gathered()
        _read(batch)

    return read


def _read(batch: Batch) -> None:
    """Read gradients, with their products with the bases that they were given."""
    right = _grads(batch).right
    _grads(batch).read_first(lowrank.sketched(right.float()) if right is not None and refreshes(batch) else right)


def _agree(batches: Sequence[Batch]) -> None:
    """Find out whether gradients are finite on all processes, and sums of their columns and blocks."""
    own = [_grads(batch).reading.flaws for batch in batches]
    padded = [pad(flaws, (0, -len(flaws) % _ALIGNED)) if len(flaws) % _ALIGNED else flaws for flaws in own]
    together = torch.cat(padded)
    numbers = [(together != 0).float()]
    for batch in batches:
        if _has_columns(batch):
            numbers.append(_grads(batch).columns)
        if _has_blocks(batch):
            numbers.append(_sums_of_blocks(batch))
    flags, *sums = total(numbers, _group(batches[0]))
    agreed, found = (flags != 0).to(torch.int32).split(list(map(len, padded))), iter(sums)
    for batch, flaws in zip(batches, agreed, strict=True):
        _grads(batch).agree(flaws[: len(batch.parts)], next(found) if _has_columns(batch) else None)
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
