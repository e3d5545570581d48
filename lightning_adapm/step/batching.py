"""Parts that go through a step together: buckets of parts that are alike, and batches of a bounded size."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_adapm.moments.first import FullMomentum
from lightning_adapm.moments.regression import LowRankRegression
from lightning_adapm.moments.second import (
    BlockSecondMoment,
    ElementwiseSecondMoment,
    FactoredSecondMoment,
    NoSecondMoment,
)
from lightning_adapm.moments.storage import EXACT
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction
from lightning_adapm.step.parts import Part, reduction_of
from lightning_adapm.step.paths import Path, unknown_moments

# Parts of one shape step together as long as their gradients have at most this many elements in total: small matrices
# share kernels, and large ones, each of which fills a device, are not copied and bound the temporaries.
_BATCH_NUMEL = {"cpu": 1 << 16, "cuda": 1 << 26}
# Where nothing is copied, temporaries are projections, which are much smaller; a refresh has several of them. Graphs
# keep them.
_UNCOPIED_NUMEL = {"cpu": 1 << 24, "cuda": 1 << 28}
_REFRESHED_NUMEL = {"cpu": 1 << 24, "cuda": 1 << 27}
# Whole matrices are copied in the dtype of products, and only several of them fill a device.
_WHOLE_NUMEL = {"cpu": 1 << 16, "cuda": 1 << 28}
EXCHANGED = 4
"""Factor by which elements count that processes exchange for whole matrices: these are copied when they are sent and
received, in both directions, and graphs have little room for copies. Products of fewer matrices would not fill a GPU.
"""
_IN_TILES = (NoSecondMoment, ElementwiseSecondMoment, BlockSecondMoment, FactoredSecondMoment)


class Batch(NamedTuple):
    """Parts that go through a step together, as the moments of the first of them declare.

    The same type is used at three sizes: a bucket has all parts that are alike; it is cut into batches, which are
    processed one at a time; and torch's operations cut these into tiles.
    """

    parts: list[Part]
    params: list[Tensor]
    """Tensors that move: views of the parameters. For shards, a bucket has everything that this process holds of the
    parameters, and a batch only the rows of its parts, which may be copies."""
    grads: list[Tensor]
    """Gradients as matrices; for shards like ``params``."""
    step: int
    path: Path
    reduction: Reduction
    """Completes sums over rows that other processes hold."""
    start: int = 0
    """Index in its batch of a tile's first part."""
    rows: tuple[int, int] | None = None
    """Rows of its single part that a tile has: the first, and the one after the last; None for all."""

    @property
    def first(self) -> int:
        """First row of a tile of some rows."""
        return self.rows[0] if self.rows else 0


def bucketed(
    moving: Iterable[tuple[Tensor, Iterable[Part], int]],
    path_of: Callable[[Sequence[Part], Sequence[Tensor]], Path],
) -> list[Batch]:
    """Sort the parts of parameters, each with a gradient and the number of its step, into buckets.

    ``path_of`` decides the path of a bucket, given its parts and their gradients.
    """
    buckets: dict[Hashable, tuple[list[Part], list[Tensor], int]] = {}
    for grad, parts, step in moving:
        for part in parts:
            key = part.alike, step, part.first.due(step), part.get("seeded")
            bucket = buckets.get(key)
            if bucket is None:
                bucket = buckets[key] = [], [], step
            bucket[0].append(part)
            bucket[1].append(grad if part.shard is not None else part.piece.matrix(grad))
    return [
        Batch(parts, [part.view for part in parts], grads, step, path_of(parts, grads), ONE_PROCESS)
        for parts, grads, step in buckets.values()
    ]


def most_together(numel: int, device: str, uncopied: bool, due: bool, whole: bool) -> int:
    """Maximum number of matrices of ``numel`` elements in a batch.

    It depends on whether a step leaves gradients ``uncopied``, is ``due`` to refresh bases, and needs ``whole``
    matrices.
    """
    limits = _BATCH_NUMEL
    if whole:
        limits = _WHOLE_NUMEL
    elif uncopied:
        limits = _REFRESHED_NUMEL if due else _UNCOPIED_NUMEL
    return max(1, limits.get(device, limits["cuda"]) // max(1, numel))


def batches(bucket: Batch) -> Iterator[Batch]:
    """Cut a bucket into batches of a bounded size, the same on every process that holds a part of them.

    The rows of shards are taken out of the parameters, which may copy them; :func:`put_back` writes them back.
    """
    part, grad = bucket.parts[0], bucket.grads[0]
    shard, path = part.shard, bucket.path
    numel = grad.numel() if shard is None else shard.most * shard.layout.shape[1:].numel()
    uncopied = path.whole if shard is not None else path.kernels or _one_by_one(part, grad, path)
    uncopied = uncopied and not isinstance(part.first, LowRankRegression)  # whose factors are copied, some in float64
    whole = part.second.whole_matrices and (path.kernels or shard is not None)  # the same on every process
    exchanged = shard is not None and part.second.whole_matrices
    numel *= EXCHANGED if exchanged else 1
    due = part.first.due(bucket.step) or (part.first.has_basis and not part.get("seeded"))
    size = most_together(numel, grad.device.type, uncopied, due, whole)
    if shard is not None and exchanged:
        size = max(size, len(shard.layout.spans))  # every process has a matrix to work on
    for start in range(0, len(bucket.parts), size):
        some = slice(start, start + size)
        parts, params, grads = bucket.parts[some], bucket.params[some], bucket.grads[some]
        if shard is not None:
            params = [part.rows(param) for part, param in zip(parts, params, strict=True)]
            grads = [part.matrix(grad) for part, grad in zip(parts, grads, strict=True)]
        yield Batch(parts, params, grads, bucket.step, path, reduction_of(parts))


def _one_by_one(part: Part, grad: Tensor, path: Path) -> bool:
    """Whether torch's operations need no temporaries of the size of gradients for parts like this one, except tiles.

    :class:`lightning_adapm.step.gradients.Gradients` are then multiplied one by one, without a copy.
    """
    if part.is_shared or grad.device.type != "cpu" or grad.dtype != part.exact or type(part.second) not in _IN_TILES:
        return False
    averaged_apart = isinstance(part.first, FullMomentum) and part.first.storage != EXACT and not path.loops
    return not averaged_apart and not unknown_moments(part)


def put_back(batch: Batch) -> None:
    """Write the moved rows of shards back into the parameters."""
    for part, moved in zip(batch.parts, batch.params, strict=True):
        if part.shard is not None:
            part.shard.put(part.view, moved)
