"""One object per piece of a parameter: what it is, where it lies in memory, and which moments it has."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.storage import Entry
from lightning_adapm.roles.piece import Piece, as_one_matrix
from lightning_adapm.sharding.find import layout_of
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.reduction import ONE_PROCESS, ProcessReduction, Reduction
from lightning_adapm.sharding.rows import RowShard, column_range


class Alike:
    """Token shared by parts that may step together, in place of all that must be equal; compared by identity."""

    __slots__ = ("__weakref__",)


class Part:
    """A piece of a parameter, as this process holds it.

    It is the :class:`~lightning_adapm.moments.storage.State` of its moments: ``part["exp_avg"]`` is an entry of the
    parameter's state without the piece's prefix.
    """

    __slots__ = (
        "alike",
        "decay",
        "first",
        "kept",
        "key",
        "layout",
        "name",
        "param",
        "piece",
        "prefix",
        "second",
        "shape",
        "shard",
        "state",
        "view",
    )

    key: tuple[int, int]
    """Number of the parameter in the optimizer and of the piece in it: the same on every process."""
    name: str
    """Name of the parameter."""
    param: Tensor
    piece: Piece
    prefix: str
    """Prefix of the piece's keys in the parameter's state."""
    layout: Layout | None
    """Elements of the parameter that each process holds; None where every process holds all."""
    shape: torch.Size
    """Shape of the piece's matrix, over all processes."""
    shard: RowShard | None
    """Rows of the matrix on this process; None for matrices that no other process holds a part of."""
    first: Momentum
    second: SecondMoment
    decay: float
    """Weight decay."""
    kept: tuple[int, int] | None
    """Columns that this process keeps of entries whose columns processes share; None for all."""
    alike: "Alike"
    """Parts with the same token may go through a step together."""
    view: Tensor
    """View of the piece in the parameter's memory; of a sharded parameter, everything that this process holds."""
    state: dict[str, Any]
    """State of the parameter."""

    def __init__(self, key: tuple[int, int], name: str, param: Tensor, piece: Piece, layout: Layout | None) -> None:
        self.key, self.name, self.param, self.piece, self.layout = key, name, param, piece, layout
        self.prefix = piece.prefix
        self.shape = piece.shape(param.shape if layout is None else layout.shape)
        self.shard = None
        if layout is not None and len(layout.spans) > 1:
            if layout.mesh is None:  # FSDP1, which cuts anywhere
                self.shape = as_one_matrix(self.shape)
                layout = replace(layout, shape=as_one_matrix(layout.shape))
            if len(self.shape) != 3:
                self.shard = RowShard(layout, piece.start, piece.stop, piece.groups, piece.transposed)

    def tune(self, first: Momentum, second: SecondMoment, group: Mapping[str, Any]) -> "Part":
        """Set the part's moments, and what follows from other options of its parameter group."""
        self.first, self.second = first, second
        self.decay = 0.0 if self.piece.role in group["no_decay"] else float(group["weight_decay"])
        self.kept = None
        if self.shard is not None and shares_basis(self.shard.layout, group.get("basis", "auto")):
            self.kept = column_range(self.shard.layout, self.shape[-1]) if len(self.shape) == 2 else None
        return self

    def bind(self, held: Tensor, state: dict[str, Any]) -> None:
        """Find the piece in this process's share of its parameter and of the parameter's state, for one step."""
        self.view = held if self.shard is not None else self.piece.view(held)
        self.state = state

    def release(self) -> None:
        """Drop references to memory, which callers may free or replace before the next step."""
        del self.view, self.state

    def __getitem__(self, key: str) -> Any:
        return self.state[self.prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.state[self.prefix + key] = value

    def get(self, key: str) -> Any:
        """An entry, or None."""
        return self.state.get(self.prefix + key)

    @property
    def label(self) -> str:
        """Name in messages: the parameter's, with the piece's where there are several."""
        return self.name if self.piece.whole else f"{self.name} ({self.piece.part or self.piece.role})"

    @property
    def entries(self) -> dict[str, Entry]:
        """Entries of its moments, by key without prefix; shapes are those over all processes."""
        return self.first.entries(self.shape) | self.second.entries(self.shape)

    @property
    def is_shared(self) -> bool:
        """Whether several processes hold parts of the parameter."""
        return self.layout is not None and len(self.layout.spans) > 1

    @property
    def held_shape(self) -> torch.Size:
        """Shape of what this process holds of the matrix."""
        if self.shard is not None:
            return torch.Size((self.shard.count, *self.shape[1:]))
        if not self.is_shared or self.layout is None or not self.shape:
            return self.shape
        first, last = self.layout.held  # of a stack of matrices
        return torch.Size(((last - first) // max(1, self.shape[1:].numel()), *self.shape[1:]))

    @property
    def held_numel(self) -> int:
        """Number of elements of the piece that this process holds."""
        return self.held_shape.numel() if self.shard is None else self.shard.numel

    @property
    def first_element(self) -> int:
        """Place in the matrix, row by row, of the first element that this process holds."""
        if self.shard is not None:
            return self.shard.first * self.shard.width
        if not self.is_shared or self.layout is None:
            return 0
        return self.layout.held[0] // max(1, self.layout.shape[1:].numel()) * self.shape[1:].numel()

    @property
    def exact(self) -> torch.dtype:
        """Dtype of the arithmetic."""
        return torch.float64 if self.param.dtype == torch.float64 else torch.float32

    def moments_made(self, device: torch.device, whole: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Zero state of the first and of the second moment, by key without prefix.

        It covers what this process holds, or the ``whole`` matrix.
        """
        like, shape = torch.empty((), dtype=self.exact, device=device), self.shape if whole else self.held_shape
        kept = None if whole else self.kept
        return self.first.make(shape, like, kept), self.second.make(shape, like, kept)

    def make(self, device: torch.device, whole: bool = False) -> dict[str, Any]:
        """Zero state of the piece, by the keys of the parameter's state."""
        first, second = self.moments_made(device, whole)
        return {self.piece.prefix + key: value for key, value in (first | second).items()}

    def rows(self, part: Tensor) -> Tensor:
        """The rows of a shard in what this process holds of a parameter or of its gradient."""
        assert self.shard is not None
        return self.shard.take(part)

    def matrix(self, grad: Tensor) -> Tensor:
        """The gradient of the piece as a matrix, from what this process holds of the parameter's."""
        if self.shard is None:
            return self.piece.matrix(grad)
        rows = self.rows(grad)
        return rows.flatten(1) if rows.dim() == 3 else rows


def parts_of(number: int, name: str, param: Tensor, pieces: Sequence[Piece]) -> tuple[Part, ...]:
    """The parts of a parameter, without moments and memory.

    Args:
        number: Its number in the optimizer.
        name: Its name.
        param: The parameter.
        pieces: Its pieces.

    Raises:
        TypeError: The parameter is sharded in a way that is not supported.
    """
    layout = layout_of(param)
    return tuple(Part((number, index), name, param, piece, layout) for index, piece in enumerate(pieces))


def new_state(parts: Iterable[Part], device: torch.device, whole: bool = False) -> dict[str, Any]:
    """Zero state of a parameter: every key that it will ever have.

    It covers what this process holds of the parameter, or the ``whole`` parameter.
    """
    state: dict[str, Any] = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
    for part in parts:
        state |= part.make(device, whole)
    return state


def shares_basis(layout: Layout, basis: str) -> bool:
    """Decide by the option ``basis`` whether each process keeps only a part of the bases.

    A replicated basis costs each process the same bytes on any number of processes, while all other state shrinks. On
    more than two, less than 90 % of AdamW's sharded momentum would be saved.
    """
    return basis == "shard" or (basis == "auto" and len(layout.spans) > 2)


def reduction_of(parts: Sequence[Part]) -> Reduction:
    """Reduction that completes the sums over rows of a batch."""
    shards = [part.shard for part in parts if part.shard is not None]
    return ProcessReduction(shards, parts[0].kept is not None) if shards else ONE_PROCESS
