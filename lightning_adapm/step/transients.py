"""Bounds of the temporary memory of a step on a GPU, computed from shapes."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from itertools import chain

import torch

from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.moments.regression import LowRankRegression
from lightning_adapm.moments.second import FactoredSecondMoment, RelativeSecondMoment
from lightning_adapm.moments.tiles import TILE_NUMEL
from lightning_adapm.step import kernels as step_kernels
from lightning_adapm.step.batching import EXCHANGED, most_together
from lightning_adapm.step.kernels import padded
from lightning_adapm.step.launch import DTYPES
from lightning_adapm.step.orthogonal import DIRECT
from lightning_adapm.step.parts import Part
from lightning_adapm.step.paths import unknown_moments
from lightning_adapm.step.reading import ROWS_OF_A_TILE, rows_of_a_product
from lightning_adapm.step.refreshing import TOGETHER_NUMEL, TOGETHER_OF_SHARDS

_FACTORS, _BASES = 8, 9
"""Float32 copies of left factors and bases of matrices that step together, in a first step."""

_FITTED_LEFTS, _FITTED_RIGHTS = 16, 18
"""Copies in float32 of the left and of the right factors while two regressors are fitted; those in float64 count twice.
"""

_SQUARES_IN_FLOAT64 = 7
"""Products of a basis with itself, which make it orthonormal."""

_BLOCKS = 4096
"""Bytes that the allocator adds to the small tensors of a part."""

_COPIES = 2
"""Copies in float32 of matrices that step together by torch's operations. An assumption."""

_DIRECTIONS, _SQUARES, _ROWS = 3, 5, 2
"""Copies of matrices that are orthogonalized, of their Gram matrices, and of a process's rows of what several hold, a
monitor's among them; in the dtype of products.
"""

_WAITING = 2
"""Batches whose matrices are exchanged between processes while another one is worked on."""

_PRODUCT = step_kernels.FACTOR.itemsize

_TILES = 6
"""Tiles in float32 that a monitor holds."""


def step_transients(parts: Iterable[Part], in_backward: bool = False) -> int:
    """Bound of the temporary bytes of a step on one GPU, in addition to weights, gradients and state.

    It is that of docs/training.md, for gradients in the dtype of their parameters, with a monitor.

    Args:
        parts: All parts that are trained.
        in_backward: Whether blocks of parameters move as soon as their gradients are complete.
    """
    moving: defaultdict[Hashable, list[Part]] = defaultdict(list)
    largest = 0
    for part in parts:
        moving[part.piece.block if in_backward else None].append(part)
        largest = max(largest, part.shape.numel())
    return max(map(held_by_a_step, moving.values()), default=0) + 4 * _TILES * min(TILE_NUMEL, largest)


def held_by_a_step(parts: Sequence[Part]) -> int:
    """Bound for parts that move in one step, which may be the first."""
    return max([held_by_recorded_steps(parts), *(bucket.first for bucket in _buckets(parts))])


def held_by_recorded_steps(parts: Sequence[Part], counts: Sequence[int] | None = None) -> int:
    """Bound for parts that move in one step, which is the first of none of them.

    Args:
        parts: The parts.
        counts: Numbers of their steps; without them, all are equal.
    """
    phases: defaultdict[tuple[int, int], list[Part]] = defaultdict(list)
    for part, count in zip(parts, counts or [0] * len(parts), strict=True):
        if isinstance(part.first, LowRankMomentum) and part.first.rank < part.shape[-1]:
            gap = part.first.update_proj_gap
            phases[gap, (part.first.offset - count) % gap].append(part)
    refreshing = list(phases.values())
    if len({gap for gap, _ in phases}) > 1:  # any of them may come together
        refreshing = [list(chain.from_iterable(refreshing))]
    buckets = _buckets(parts)
    moving = max((bucket.moving(due=False) for bucket in buckets), default=0)
    refreshed = max((_refreshed(_buckets(phase)) for phase in refreshing), default=0)
    waiting = max((bucket.waiting for bucket in buckets), default=0)
    return max(moving, refreshed) + sum(bucket.read for bucket in buckets) + waiting


def _refreshed(buckets: Sequence["_Bucket"]) -> int:
    """Bound of a refresh: bases are found some at a time, and all of them wait until their parameters move."""
    bases = sum(bucket.number * bucket.basis for bucket in buckets)
    largest = max(bucket.together(due=True) * bucket.basis for bucket in buckets)
    shared = any(bucket.is_sharded for bucket in buckets)
    some = min(bases, (TOGETHER_OF_SHARDS if shared else TOGETHER_NUMEL) + largest)
    matrices = min(
        sum(bucket.number * bucket.stack for bucket in buckets),
        some // min(bucket.basis // bucket.stack for bucket in buckets),
    )
    squares = _SQUARES_IN_FLOAT64 * matrices * max(bucket.rank for bucket in buckets) ** 2
    gathered = some if any(bucket.shares_basis for bucket in buckets) else 0
    # next and old bases, copies in float64, and of one batch the next ones of these
    orthonormal = 8 * some + 8 * (some + largest + squares) + 4 * gathered
    iterated = 8 * some + max(bucket.iterated for bucket in buckets)
    if shared:  # weights of all wait for each other, and then what is summed
        iterated += 4 * some + sum(bucket.number * bucket.weights for bucket in buckets)
    moving = 4 * some + max(bucket.moving(due=True) for bucket in buckets)
    return 4 * (bases - some) + max(orthonormal, iterated, moving)


def _buckets(parts: Iterable[Part]) -> list["_Bucket"]:
    alike: defaultdict[Hashable, list[Part]] = defaultdict(list)
    for part in parts:
        alike[part.alike].append(part)
    return [_Bucket(each[0], len(each)) for each in alike.values()]


class _Bucket:
    """A number of equal parts, as they lie on the process that holds most of their rows."""

    def __init__(self, part: Part, number: int) -> None:
        self.number, self._part, self._shard = number, part, part.shard
        self._shape = part.shape if part.shard is None else torch.Size((part.shard.most, *part.shape[1:]))
        self.stack = self._shape[:-2].numel()
        self._m, self._n = (1, 1, *self._shape)[-2:]
        self._kernels = part.param.dtype in DTYPES and not unknown_moments(part)
        self._whole = self._kernels and part.second.whole_matrices
        self.rank = min(part.first.rank, self._n) if isinstance(part.first, LowRankMomentum) else 0
        self.shares_basis = part.kept is not None

    @property
    def basis(self) -> int:
        """Elements of the basis of a part."""
        return self.stack * self.rank * self._n

    @property
    def _rows(self) -> int:
        return self.stack * self._m

    @property
    def _sums(self) -> int:
        """Bytes of sums over tiles of rows, for each column, of a part."""
        by_columns = isinstance(self._part.second, FactoredSecondMoment | RelativeSecondMoment)
        return 4 * self.stack * -(-self._m // ROWS_OF_A_TILE) * self._n if by_columns else 0

    @property
    def read(self) -> int:
        """Bytes that stay after gradients were read, until all parameters have moved: sums by row and column, flags;
        of shards products with bases as well, and bases that were gathered.
        """
        held = 12 * self._rows + (8 * self.stack * self._n if self._sums else 0) + _BLOCKS
        if self._shard is not None and self.rank:
            held += 4 * self._rows * padded(self.rank) + (12 * self.basis if self.shares_basis else 0)
        return self.number * held

    def together(self, due: bool) -> int:
        """Number of parts in a batch."""
        numel = self._shape.numel() * (EXCHANGED if self._exchanged else 1)
        uncopied = self._kernels and not isinstance(self._part.first, LowRankRegression)
        size = most_together(numel, "cuda", uncopied, due=due, whole=self._whole)
        return min(self.number, max(size, self._owners))

    @property
    def _exchanged(self) -> bool:
        return self._whole and self._shard is not None

    @property
    def _owners(self) -> int:
        """Number of processes of which each has some of the matrices to itself."""
        return len(self._shard.layout.spans) if self._exchanged and self._shard is not None else 1

    def moving(self, due: bool) -> int:
        """Bytes while a batch moves, whether its bases are new or not."""
        together = self.together(due)
        if not self._kernels:
            return 4 * _COPIES * together * self._shape.numel()
        if isinstance(self._part.first, LowRankRegression):
            return together * self._fitted(self._part.first.rank)
        factors = padded(2 * self.rank) if due else padded(self.rank)
        held = _PRODUCT * self._rows * factors
        held = max(held, self._sums) + (4 * self._rows * padded(self.rank) if self.rank else 0)
        if due:  # left factors in the new basis, and both bases
            held += 4 * self._rows * padded(self.rank) + 14 * self.basis
        else:
            held += 6 * self.basis
        return together * held + self._orthogonal(together)

    def _fitted(self, rank: int) -> int:
        """Bytes of factors of a ``rank`` while they are fitted to a part."""
        products = 1 + -(-self._m // rows_of_a_product(self._n))  # of one after the other
        right = self.stack * rank * self._n
        lefts, rights = _FITTED_LEFTS * self._rows * padded(rank), (_FITTED_RIGHTS + products) * right
        return 4 * (lefts + rights) + 2 * 8 * _SQUARES_IN_FLOAT64 * self.stack * rank**2

    @property
    def is_sharded(self) -> bool:
        """Whether processes share the rows."""
        return self._shard is not None

    @property
    def weights(self) -> int:
        """Bytes of the weights of a part's gradient in the sums that its next basis is found from."""
        return _PRODUCT * self._rows * self.rank

    @property
    def iterated(self) -> int:
        """Bytes while the next bases of a batch are computed, before they are made orthonormal."""
        products = -(-self._m // rows_of_a_product(self._n))
        projected, weights = 4 * self._rows * padded(self.rank), self.weights
        read = projected + max(self._sums, weights + self._rows * self.rank // 8)
        combined = weights + 4 * self.basis * (products + (products > 1))
        return self.together(due=True) * (max(read, combined) + 14 * self.basis)

    @property
    def first(self) -> int:
        """Bytes of a first step, whose bases are found batch by batch."""
        together = self.together(due=True)
        left, squares = self._rows * self.rank, self.stack * self.rank**2
        held = 4 * (_FACTORS * left + _BASES * self.basis) + 8 * _SQUARES_IN_FLOAT64 * squares + self._sums
        return together * held + self._orthogonal(together) + self.waiting + self.read

    def _orthogonal(self, together: int) -> int:
        """Bytes of whole matrices that are orthogonalized, of each process its own, and of their rows."""
        if not self._whole:
            return 0
        held = -(-together // self._owners) * _of_whole_matrices(self._part.shape)
        return held + (together * _of_directions(self._shape, _ROWS) if self._exchanged else 0)

    @property
    def waiting(self) -> int:
        """Bytes of matrices that are exchanged meanwhile."""
        if not self._exchanged:
            return 0
        together = self.together(due=False)
        rows = together * self._shape.numel() + -(-together // self._owners) * self._part.shape.numel()
        return _WAITING * rows * _PRODUCT


def _of_whole_matrices(shape: torch.Size) -> int:
    """Directions, a copy for a monitor, updates, and square matrices of Newton-Schulz."""
    squares = shape[:-2].numel() * min(shape[-2:]) ** 2
    return _of_directions(shape, _DIRECTIONS) + _PRODUCT * _SQUARES * squares


def _of_directions(shape: torch.Size, copies: int) -> int:
    """Copies of directions, and sizes of their tiles."""
    m, n = shape[-2:]
    tiles = -(-m // DIRECT[0]) * -(-n // DIRECT[1])
    return shape[:-2].numel() * (_PRODUCT * copies * m * n + 40 * tiles)
