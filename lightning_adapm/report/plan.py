"""Bytes of optimizer state: planned from shapes before training, and measured from what an optimizer holds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import local, shape_of

# How optimizers of torch and the peers call their first and second moments.
_MOMENTUM = ("exp_avg", "exp_avg_l", "exp_avg_r", "momentum_buffer", "m", "mu", "mu_product", "state1")
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
        return self.momentum + self.second_moment + self.other

    def __add__(self, more: "StateBytes") -> "StateBytes":
        return StateBytes(
            self.momentum + more.momentum, self.second_moment + more.second_moment, self.other + more.other
        )


@dataclass(frozen=True)
class Row:
    """One piece of one parameter in a plan.

    ``shape`` is that of the piece's matrix. ``rows`` describes its part of a fused weight, and is empty for a whole
    parameter. ``why`` names the rule that found the role. ``dtype`` is the parameter's. ``bytes`` are those of the
    state, ``adamw`` those of AdamW's in float32.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    rows: str
    why: str
    policy: str
    rank: int | None
    dtype: torch.dtype
    bytes: StateBytes
    adamw: StateBytes

    @property
    def numel(self) -> int:
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
    """Count the bytes that any torch optimizer's state holds now."""
    return sum((state_bytes(state) for state in optimizer.state.values()), StateBytes())


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
            name = optimizer.names[param]
            placement = optimizer.placement(param)
            held = tuple(placement.local_numel(index) for index in range(len(placement.shapes)))
            alike = (placement.shapes, held, param.dtype, optimizer.pieces[param])
            if alike not in known:
                known[alike] = _plan_one(optimizer, group, name, param)
            rows += [replace(row, name=name, why=optimizer.reasons[param]) for row in known[alike]]
    return rows


def _plan_one(optimizer: RoleOptimizer, group: Mapping[str, Any], name: str, param: Tensor) -> list[Row]:
    """Plan one parameter."""
    rows = []
    state = optimizer.make_state(param, group, torch.empty(0, device="meta"))
    counters = StateBytes(other=state_bytes({"step": state["step"]}).other)  # in the first row
    placement = optimizer.placement(param)
    for index, (piece, shape) in enumerate(zip(optimizer.pieces[param], placement.shapes, strict=True)):
        momentum = optimizer.momentum_for(piece, shape, group)
        own = {k: v for k, v in state.items() if k != "step" and k.startswith(piece.prefix)}
        adamw = adamw_bytes([torch.Size((placement.local_numel(index),))])
        rows.append(
            Row(
                name,
                piece.role,
                tuple(shape),
                _rows(piece, shape_of(param)),
                optimizer.reasons[param],
                momentum.name,
                getattr(momentum, "rank", None),
                param.dtype,
                state_bytes(own) + counters,
                StateBytes(adamw.momentum, adamw.second_moment, counters.other),
            )
        )
        counters = StateBytes()
    return rows


def _rows(piece: Piece, shape: torch.Size) -> str:
    """Describe a piece's rows in a parameter of ``shape`` for people, or its columns if the weight is transposed."""
    if piece.whole:
        return ""
    kind = "columns" if piece.transposed else "rows"
    every = f" of every {shape[int(piece.transposed)] // piece.groups}" if piece.groups > 1 else ""
    return f"{kind} {piece.start}:{piece.stop}{every}"
