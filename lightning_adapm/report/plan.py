"""Bytes of optimizer state: planned from shapes before training, and measured from what an optimizer holds."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.optim.part_table import tune
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import local, shape_of
from lightning_adapm.step.kernels import runs_on
from lightning_adapm.step.launch import MOST_BYTES_OF_TABLES
from lightning_adapm.step.parts import Part, new_state
from lightning_adapm.step.transients import held_by_recorded_steps

_AROUND_GRAPHS = 1 << 26
"""Assumed bytes of cuBLAS's workspace for captures, and of the allocator's blocks that graphs do not fill."""

# How optimizers of torch and the peers call their first and second moments.
_MOMENTUM = ("exp_avg", "momentum_buffer", "m", "mu", "mu_product", "state1")
_SECOND_MOMENT = (
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "row_var",
    "col_var",
    "variance",
    "v",
    "vmean",
    "state2",  # bitsandbytes
)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state by kind; ``other`` is for step counters and the like."""

    momentum: int = 0
    second_moment: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return self.momentum + self.second_moment + self.other

    def __add__(self, more: "StateBytes") -> "StateBytes":
        return StateBytes(
            self.momentum + more.momentum, self.second_moment + more.second_moment, self.other + more.other
        )


@dataclass(frozen=True)
class Row:
    """One piece of one parameter in a plan."""

    name: str
    """Name of the parameter."""
    role: str
    """Role of the piece, or a policy."""
    shape: tuple[int, ...]
    """Shape of the piece's matrix."""
    rows: str
    """Rows of a fused weight that the piece consists of, in words; empty for a whole parameter."""
    why: str
    """Rule that found the role."""
    policy: str
    """Policy of the momentum: ``"none"``, ``"low_rank"`` or ``"full"``."""
    rank: int | None
    """Rank of the momentum; None where it is not low-rank."""
    dtype: torch.dtype
    """Dtype of the parameter."""
    bytes: StateBytes
    """Bytes of the state."""
    adamw: StateBytes
    """Bytes of ``torch.optim.AdamW``'s state in float32."""
    orthogonal: bool = False
    """Whether updates are orthogonal."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def adamw_in_dtype(self) -> StateBytes:
        """Bytes of ``torch.optim.AdamW``'s state in the parameter's dtype."""
        moment = self.adamw.momentum // 4 * self.dtype.itemsize
        return StateBytes(moment, moment, self.adamw.other)


def state_bytes(state: Mapping[str, Any]) -> StateBytes:
    """Count bytes on this process in a parameter's state, nested tensors included; keys may have a piece's prefix."""
    total = StateBytes()
    for key, value in state.items():
        if isinstance(value, Mapping):
            total += state_bytes(value)
        elif isinstance(value, (list, tuple)):
            total += state_bytes({f"{key}.{index}": item for index, item in enumerate(value)})
        elif isinstance(value, Tensor):
            size, kind = local(value).numel() * value.element_size(), key.rpartition(".")[2]
            if kind.startswith(_SECOND_MOMENT[0]) or kind in _SECOND_MOMENT:
                total += StateBytes(second_moment=size)
            elif kind in _MOMENTUM:
                total += StateBytes(momentum=size)
            else:
                total += StateBytes(other=size)
    return total


def measure(optimizer: Optimizer) -> StateBytes:
    """Bytes that any torch optimizer's state holds now."""
    if not isinstance(optimizer, RoleOptimizer):
        return sum((state_bytes(state) for state in optimizer.state.values()), StateBytes())
    held = (held_bytes(optimizer.parts(param), state) for param, state in optimizer.state.items())
    return sum(chain.from_iterable(held), StateBytes())


def cached_bytes(optimizer: RoleOptimizer) -> int:
    """Bound of ``optimizer.cached_bytes()``.

    It covers the matrices that bases and regressors start from, tables of addresses, and the memory of recorded steps.
    """
    starts, devices, stepping = set(), set(), []
    for param in optimizer.pieces:
        for part in optimizer.parts(param):
            devices.add(param.device)
            if param.requires_grad and runs_on(param.device):
                stepping.append(part)
            if (rank := getattr(part.first, "rank", 0)) and param.requires_grad:
                rank = min(rank, part.shape[-1])
                starts.add((rank * part.shape[-1] * part.exact.itemsize, rank, param.device))
    tables = MOST_BYTES_OF_TABLES * sum(runs_on(device) for device in devices)
    kept = held_by_recorded_steps(stepping) if stepping else 0
    if optimizer.update_in_backward:  # of a part of them at a time
        kept = min(kept, optimizer.most_recorded_bytes)
    recorded = kept + _AROUND_GRAPHS if 0 < kept <= optimizer.most_recorded_bytes else 0
    return sum(size for size, _, _ in starts) + tables + recorded


def adamw_bytes(shapes: Iterable[torch.Size], element_size: int = 4) -> StateBytes:
    """Bytes of ``torch.optim.AdamW``'s state for parameters of these shapes, by default in float32."""
    numels = [shape.numel() for shape in shapes]
    moment = element_size * sum(numels)
    return StateBytes(moment, moment, 4 * len(numels))


def plan(optimizer: RoleOptimizer, changes: Mapping[str, Any] | None = None) -> list[Row]:
    """Plan the state of every trainable parameter, with one row per piece.

    Where parameters are sharded, all bytes are those of this process, including AdamW's. The state is made on the meta
    device by the function that makes it in training, so the rows add up to the bytes that training allocates.
    ``changes`` replace entries of the optimizer's parameter groups.
    """
    rows: list[Row] = []
    for group in (own | dict(changes or {}) for own in optimizer.param_groups):
        known: dict[Any, list[Row]] = {}  # parameters that are alike have the same rows: experts come in thousands
        for param in group["params"]:
            if not param.requires_grad:
                continue
            parts = optimizer.parts(param)
            alike = tuple((part.shape, part.held_numel, param.dtype, part.piece) for part in parts)
            if alike not in known:
                known[alike] = _plan_one(optimizer, group, parts)
            rows += [replace(row, name=optimizer.names[param], why=optimizer.reasons[param]) for row in known[alike]]
    return rows


def _plan_one(optimizer: RoleOptimizer, group: Mapping[str, Any], parts: Iterable[Part]) -> list[Row]:
    """The rows of one parameter, with the moments that the options of ``group`` mean."""
    rows = []
    counters = StateBytes(other=new_state((), torch.device("cpu"))["step"].element_size())  # in the first row
    for part in (tune(copy(part), optimizer, group) for part in parts):
        adamw = adamw_bytes([torch.Size((part.held_numel,))])
        first, second = part.moments_made(torch.device("meta"))
        own = StateBytes(_size(first.values()), _size(second.values()))
        rows.append(
            Row(
                name=part.name,
                role=part.piece.role,
                shape=tuple(part.shape),
                rows=_rows(part.piece, shape_of(part.param)),
                why=optimizer.reasons[part.param],
                policy=part.first.name,
                rank=getattr(part.first, "rank", None),
                dtype=part.param.dtype,
                bytes=own + counters,
                adamw=StateBytes(adamw.momentum, adamw.second_moment, counters.other),
                orthogonal=part.second.whole_matrices,
            )
        )
        counters = StateBytes()
    return rows


def held_bytes(parts: Sequence[Part], state: Mapping[str, Any]) -> list[StateBytes]:
    """Bytes that a parameter's state holds, by part; what belongs to no part is the first one's."""
    rest, held = dict(state), []
    for part in parts:
        first, second = (
            [rest.pop(part.piece.prefix + key, None) for key in made]
            for made in part.moments_made(torch.device("meta"))
        )
        held.append(StateBytes(_size(first), _size(second)))
    return [held[0] + StateBytes(other=_size(rest.values())), *held[1:]]


def _size(values: Iterable[Any]) -> int:
    return sum(local(value).numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _rows(piece: Piece, shape: torch.Size) -> str:
    """Describe a piece's rows in a parameter of ``shape`` in words, or its columns if the weight is transposed."""
    if piece.whole:
        return ""
    kind = "columns" if piece.transposed else "rows"
    every = f" of every {shape[int(piece.transposed)] // piece.groups}" if piece.groups > 1 else ""
    return f"{kind} {piece.start}:{piece.stop}{every}"
