"""Sharded state: saved as if one device had trained, and loaded on any number of processes.

In memory a process holds plain tensors with its own rows. A state dict holds tensors that the parameters' strategy can
save and shard again.

- FSDP2: DTensors of the shapes on one device, sharded along their first dimension. State that is equal on all processes
  is a plain tensor.
- FSDP1 supports only tensors like its flat parameters, with the same names for every parameter. All state of a
  parameter becomes one vector, cut into ``packed_0``, ``packed_1``, ... of the parameter's shape and filled with zeros.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import shape_of
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.reduction import ProcessReduction
from lightning_adapm.sharding.rows import RowShard, column_range
from lightning_adapm.step.parts import Placement

_PACKED = "packed_"


class Stateful(Protocol):
    """Interface of an optimizer for saving and loading."""

    param_groups: list[dict[str, Any]]
    pieces: dict[Tensor, tuple[Piece, ...]]

    def follow_groups(self) -> None: ...

    def placement(self, param: Tensor) -> Placement: ...

    def make_state(
        self, param: Tensor, group: Mapping[str, Any], like: Tensor, whole: bool = False
    ) -> dict[str, Any]: ...

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum: ...

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment: ...


def export_state(
    optimizer: Stateful, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> Mapping[str, Any]:
    """State of one parameter for a state dict. Call it on every process that holds a part of the parameter."""
    layout = optimizer.placement(param).layout
    if layout is None:
        return state
    if not isinstance(param, DTensor):
        return {"step": state["step"], **_pack(optimizer, param, group, state, layout)}
    whole = _whole_shapes(optimizer, param, group)
    exported = dict(state)
    for piece, shard, keys in _pieces(optimizer, param, group):
        for key in keys:
            rows = state[key]
            if shard is not None and not _aligned(piece, shard):
                size = -(-shard.size // len(layout.spans))  # what a DTensor keeps on each process
                rows = _gather(shard, rows)[size * layout.rank : size * (layout.rank + 1)].clone()
            exported[key] = _dtensor(rows, param, 0, whole[key])
        key = piece.prefix + "exp_avg_r"
        if key in state and state[key].shape[-1] < whole[key].shape[-1]:
            exported[key] = _dtensor(state[key], param, 1, whole[key])
    return exported


def _dtensor(part: Tensor, param: DTensor, dim: int, whole: Tensor) -> DTensor:
    placements = [Shard(dim) if kind == Shard(0) else kind for kind in param.placements]
    return DTensor.from_local(
        part, param.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def import_entry(
    optimizer: Stateful, param: Tensor, group: Mapping[str, Any], entry: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """A saved entry with a state dict's tensors for one device, sharded or not; None where nothing was saved.

    Call it on every process that holds a part of the parameter; under FSDP1 each has a part of the entry.

    Raises:
        ValueError: FSDP1 has cut a state that was saved with other settings.
    """
    layout = optimizer.placement(param).layout
    if layout is not None and not isinstance(param, DTensor):
        entry = _whole_entry(optimizer, param, group, entry, layout)
    if not entry or _PACKED + "0" not in entry:
        return dict(entry) if entry else None
    packed = torch.cat([_full(entry[key]).flatten() for key in sorted(entry) if key.startswith(_PACKED)])
    return {**_unpack(optimizer, param, group, packed), "step": entry["step"]}


def localise(optimizer: Stateful, param: Tensor, group: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    """Copy this process's part of a whole parameter's state, from DTensors or whole tensors."""
    state = optimizer.make_state(param, group, param)
    rest, layout = dict(whole), optimizer.placement(param).layout
    for piece, shard, keys in _pieces(optimizer, param, group):
        for key in keys:
            value = rest.pop(key)
            if isinstance(value, DTensor) and _aligned(piece, shard):
                state[key].copy_(value.to_local())
            elif shard is not None:
                state[key].copy_(_held(shard, _full(value)))
            elif layout is not None:  # a stack of matrices
                inner = layout.shape[1:].numel()
                state[key].copy_(_full(value)[layout.held[0] // inner : layout.held[1] // inner])
        right = state.get(piece.prefix + "exp_avg_r")
        if right is not None and right.dim() == 3:  # of the matrices held here, which the saved number is not
            rest[piece.prefix + "seeded"] = int(right.any(dim=-1).any(dim=-1).all())
    for key, value in rest.items():
        if isinstance(state[key], Tensor):
            value = _full(torch.as_tensor(value))
            if layout is not None and state[key].shape != value.shape:  # a basis that the processes share out
                value = value[..., slice(*column_range(layout, value.shape[-1]))]
            state[key].copy_(value)
        else:
            state[key] = int(value)
    return state


def fits(optimizer: Stateful, param: Tensor, group: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    """Whether a saved entry has the keys and shapes of the whole parameter's state."""
    whole = _whole_shapes(optimizer, param, group)
    return whole.keys() == entry.keys() and all(
        torch.as_tensor(entry[key]).shape == value.shape for key, value in whole.items() if isinstance(value, Tensor)
    )


def full_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the tensors of a saved entry."""
    return {key: _full(value) if isinstance(value, Tensor) else value for key, value in entry.items()}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _whole_shapes(optimizer: Stateful, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    return optimizer.make_state(param, group, torch.empty(0, device="meta"), whole=True)


def _pieces(
    optimizer: Stateful, param: Tensor, group: Mapping[str, Any]
) -> Iterator[tuple[Piece, RowShard | None, list[str]]]:
    """Pieces with the keys of entries that have a row for each of theirs, and are sharded like them."""
    placement, meta = optimizer.placement(param), torch.empty((), device="meta")
    for piece, shape, shard in zip(optimizer.pieces[param], placement.shapes, placement.shards, strict=True):
        makers = (optimizer.momentum_for(piece, shape, group), optimizer.second_moment_for(piece, shape, group))
        one_more = torch.Size((shape[0] + 1, *shape[1:])) if shape else shape
        made, larger = (
            {k: v for maker in makers for k, v in maker.make(size, meta).items()} for size in (shape, one_more)
        )
        keys = [k for k, v in made.items() if isinstance(v, Tensor) and v.shape != larger[k].shape]
        yield piece, shard, [piece.prefix + key for key in keys]


def _aligned(piece: Piece, shard: RowShard | None) -> bool:
    """Whether the rows of a piece lie on the processes as a DTensor's would, unlike those of a fused weight."""
    return shard is None or piece.whole or piece.transposed


def _gather(shard: RowShard, rows: Tensor) -> Tensor:
    """Gather all rows of a matrix's state, as a sum over processes."""
    if rows.shape[-1] != shard.width and not shard.owns_first:  # one value for a row that begins on another process
        rows = torch.cat([torch.zeros_like(rows[:1]), rows[1:]])
    full = rows.new_zeros(shard.size, *rows.shape[1:])
    full[shard.first : shard.first + shard.count] = rows
    dist.all_reduce(full, group=shard.layout.group)
    return full


def _held(shard: RowShard, full: Tensor) -> Tensor:
    rows = full[shard.first : shard.first + shard.count]
    return shard.held_only(rows) if full.dim() == 2 and full.shape[-1] == shard.width else rows


def _pack(
    optimizer: Stateful, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], layout: Layout
) -> dict[str, Tensor]:
    """This process's part of a parameter's whole state."""
    exact = torch.float64 if param.dtype == torch.float64 else torch.float32
    vectors: dict[str, Tensor] = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    for piece, shard, keys in _pieces(optimizer, param, group):
        assert shard is not None
        vectors |= {key: _gather(shard, state[key]) for key in keys}
        right = piece.prefix + "exp_avg_r"
        if right in vectors and vectors[right].shape[-1] < shard.width:
            vectors[right] = ProcessReduction([shard]).columns(vectors[right], shard.width)
    numel = layout.shape.numel()
    packed = torch.zeros(_count(optimizer) * numel, dtype=exact, device=param.device)
    place = 0
    for key in sorted(vectors.keys() - {"step"}):
        packed[place : place + vectors[key].numel()] = vectors[key].flatten()
        place += vectors[key].numel()
    first, last = layout.held
    return {f"{_PACKED}{i}": part[first:last].clone() for i, part in enumerate(packed.view(-1, numel))}


def _unpack(optimizer: Stateful, param: Tensor, group: Mapping[str, Any], packed: Tensor) -> dict[str, Any]:
    entry, place = _whole_shapes(optimizer, param, group), 0
    for key in sorted(key for key, value in entry.items() if isinstance(value, Tensor) and key != "step"):
        shape = entry[key].shape
        entry[key] = packed[place : place + shape.numel()].view(shape)
        place += shape.numel()
    if packed[place:].any():
        raise ValueError(
            "the saved state is FSDP1's, of an optimizer with another rank, second moment or policy; load it with the"
            " settings it was saved with"
        )
    for key in [key for key in entry if key.endswith("seeded")]:
        entry[key] = int(entry[key.removesuffix("seeded") + "exp_avg_r"].any())
    return entry


def _count(optimizer: Stateful) -> int:
    """Number of tensors of a parameter's shape that hold its state, the same for all parameters."""
    count = 1
    for group in optimizer.param_groups:
        for param in group["params"]:
            whole = {k: v for k, v in _whole_shapes(optimizer, param, group).items() if k != "step"}
            numel = sum(value.numel() for value in whole.values() if isinstance(value, Tensor))
            count = max(count, -(-numel // max(1, shape_of(param).numel())))
    return count


def _whole_entry(
    optimizer: Stateful, param: Tensor, group: Mapping[str, Any], entry: Mapping[str, Any] | None, layout: Layout
) -> dict[str, Any] | None:
    """Gather a state that FSDP1 has cut.

    Whatever a saved tensor's shape, FSDP1 gives each process the elements at the process's places in the parameter, in
    row-major order. Nothing is lost, because no state of AdaPM is larger than its parameter.
    """
    first, _ = layout.held
    tensors = {
        key: value.flatten() for key, value in (entry or {}).items() if isinstance(value, Tensor) and value.dim()
    }
    mine = {key: first + value.numel() if value.numel() else 0 for key, value in tensors.items()}
    rest = {key: torch.as_tensor(value).item() for key, value in (entry or {}).items() if key not in tensors}
    found: list[Any] = [None] * len(layout.spans)
    dist.all_gather_object(found, (mine, rest), group=layout.group)
    whole: dict[str, Any] = next((others for _, others in found if others), {})
    if not whole:
        return None
    shapes = {
        key: value.shape for key, value in _whole_shapes(optimizer, param, group).items() if torch.is_tensor(value)
    }
    for key in sorted({key for ends, _ in found for key in ends}):
        size = max(ends.get(key, 0) for ends, _ in found)
        shape = shapes.get(key)
        if shape is None or shape.numel() != size:
            shape = layout.shape
        if shape.numel() != size:
            raise ValueError(
                f"{key} of the saved state has {size} elements, where this optimizer has {shapes.get(key, 'none')}: it"
                " was saved with another rank, second moment or policy, and FSDP1 does not say in what shape. Load it"
                " with the settings it was saved with, or on a single device, with DDP or with FSDP2, which convert it"
            )
        flat = torch.zeros(size, dtype=torch.float64, device=param.device)
        if mine.get(key):
            flat[first : first + tensors[key].numel()] = tensors[key]
        dist.all_reduce(flat, group=layout.group)
        whole[key] = flat.view(shape)
    return whole
