"""The pieces of one step, and the batches in which they are processed together."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.orthogonal import Orthogonal
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import layout_of
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.reduction import ONE_PROCESS, ProcessReduction, Reduction
from lightning_adapm.sharding.rows import RowShard

# Pieces of one shape are taken through a step together while their gradients hold at most this many elements: small
# matrices share kernels, large ones (which fill a device alone) are not copied and bound the temporaries.
_BATCH_NUMEL = {"cpu": 1 << 16, "cuda": 1 << 24}
# Where nothing is copied, temporaries are projections, a small share of that, and several of them in a refresh.
_UNCOPIED_NUMEL, _REFRESHED_NUMEL = 1 << 29, 1 << 28


class Placement(NamedTuple):
    """Placement of a parameter's pieces: all on this process, or divided by ``layout``."""

    layout: Layout | None
    shapes: tuple[torch.Size, ...]
    """Shapes of the pieces' matrices over all processes."""
    shards: tuple[RowShard | None, ...]
    """This process's rows of each matrix; None for matrices that this process holds alone."""

    @classmethod
    def of(cls, param: Tensor, pieces: Sequence[Piece]) -> "Placement":
        """Find the placement of a parameter.

        Raises:
            TypeError: The parameter is sharded in an unsupported way.
        """
        layout = layout_of(param)
        shapes = tuple(piece.shape(param.shape if layout is None else layout.shape) for piece in pieces)
        if layout is None or len(layout.spans) == 1:
            return cls(layout, shapes, (None,) * len(pieces))
        return cls(
            layout,
            shapes,
            tuple(
                None if len(shape) == 3 else RowShard(layout, piece.start, piece.stop, piece.groups, piece.transposed)
                for piece, shape in zip(pieces, shapes, strict=True)
            ),
        )

    def local_shape(self, index: int) -> torch.Size:
        """Shape of this process's part of a piece's matrix."""
        shape, shard = self.shapes[index], self.shards[index]
        if shard is not None:
            return torch.Size((shard.count, *shape[1:]))
        if self.layout is None or len(self.layout.spans) == 1 or not shape:
            return shape
        first, last = self.layout.held  # of a stack of matrices
        return torch.Size(((last - first) // max(1, shape[1:].numel()), *shape[1:]))

    def local_numel(self, index: int) -> int:
        """Number of a piece's elements that this process holds."""
        shard = self.shards[index]
        return self.local_shape(index).numel() if shard is None else shard.numel


def shares_basis(layout: Layout, basis: str) -> bool:
    """Decide by the option ``basis`` whether each process keeps only a part of the bases.

    A replicated basis costs each process the same bytes on any number of processes, while all other state shrinks. On
    more than two, less than 90 % of AdamW's sharded momentum would be saved.
    """
    return basis == "shard" or (basis == "auto" and len(layout.spans) > 2)


class Task(NamedTuple):
    """One piece in one step. ``param`` is a view to update, ``grad`` the gradient as a matrix.

    For a piece that other processes hold parts of, both are the local part of the whole parameter until :meth:`taken`.
    """

    name: str
    owner: Tensor
    """Parameter of the piece."""
    piece: Piece
    param: Tensor
    grad: Tensor
    state: "PieceState"
    layout: Layout | None = None
    shard: RowShard | None = None

    @property
    def key(self) -> tuple[Tensor, str]:
        """Identity of the piece in the optimizer, because names may be equal."""
        return self.owner, self.piece.prefix

    def taken(self) -> "Task":
        """Restrict the task to the rows of ``shard``."""
        if self.shard is None:
            return self
        grad = self.shard.take(self.grad)
        return self._replace(param=self.shard.take(self.param), grad=grad.flatten(1) if grad.dim() == 3 else grad)


class Plan(NamedTuple):
    """The part of a piece's step that is the same while the settings of its group stay the same.

    It holds no tensors, because they would keep memory alive that callers have freed, or be views of storage that they
    have replaced. Pieces with the same ``alike`` can step together.
    """

    piece: Piece
    layout: Layout | None
    shard: RowShard | None
    momentum: Momentum
    second_moment: SecondMoment
    decay: float
    alike: "Alike"

    def task(self, name: str, owner: Tensor, part: Tensor, grad: Tensor, state: dict[str, Any]) -> Task:
        """Make the task of this step; ``part`` and ``grad`` are this process's part of the parameter ``owner``."""
        piece = self.piece
        if self.shard is None:
            part, grad = piece.view(part), piece.matrix(grad)
        return Task(name, owner, piece, part, grad, PieceState(state, piece.prefix), self.layout, self.shard)


class Alike:
    """Token for everything that must be equal in pieces that step together; compared by identity."""

    __slots__ = ("__weakref__",)


class Bucket(NamedTuple):
    """Pieces that step together, by the ``plan`` of the first of them."""

    plan: Plan
    step: int
    tasks: list[Task]


class Observer(Protocol):
    """Observer of every piece within a step; see :class:`lightning_adapm.report.diagnostics.ResidualProbe`."""

    def __call__(self, task: Task, direction: Tensor, update: Tensor, clip_threshold: float | None) -> None:
        """Record a piece: ``direction`` is the momentum used, ``update`` the update before a clamp, in units of lr."""
        ...


class PieceState:
    """Entries of a parameter's state that belong to one piece, without their prefix."""

    __slots__ = ("_prefix", "_state")

    def __init__(self, state: dict[str, Any], prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def __getitem__(self, key: str) -> Any:
        return self._state[self._prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[self._prefix + key] = value

    def get(self, key: str) -> Any:
        return self._state.get(self._prefix + key)


def batches(bucket: Bucket, copied: bool) -> Iterable[list[Task]]:
    """Divide pieces of one shape into batches of a bounded size, the same on every process that holds a part of them.

    ``copied`` is whether a step copies their gradients.
    """
    plan, step, tasks = bucket
    grad, shard = tasks[0].grad, tasks[0].shard
    numel = grad.numel() if shard is None else shard.most * shard.layout.shape[1:].numel()
    if copied:
        limit = _BATCH_NUMEL.get(grad.device.type, _BATCH_NUMEL["cuda"])
    else:
        limit = _REFRESHED_NUMEL if plan.momentum.due(step) else _UNCOPIED_NUMEL
    size = max(1, limit // max(1, numel))
    if shard is not None and isinstance(plan.second_moment, Orthogonal):
        size = max(size, len(shard.layout.spans))  # every process has a matrix to work on
    return (tasks[start : start + size] for start in range(0, len(tasks), size))


def reduction_of(tasks: list[Task]) -> Reduction:
    """Reduction that completes the sums over rows of a batch."""
    shards = [task.shard for task in tasks if task.shard is not None]
    return ProcessReduction(shards) if shards else ONE_PROCESS
