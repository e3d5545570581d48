"""Sharded state: saved as if one device had trained, and loaded on any number of processes.

In memory a process holds plain tensors with its own rows. A state dict holds tensors that the parameters' strategy can
save and shard again.

- FSDP2: DTensors of the shapes on one device, sharded along their first dimension. State that is equal on all processes
  is a plain tensor.
- FSDP1: vectors that :mod:`lightning_adapm.state.packed` makes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_adapm.moments.storage import Entry, decoded
from lightning_adapm.sharding.find import is_dtensor, local
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.rows import RowShard
from lightning_adapm.state.entries import (
    Parts,
    entries_of,
    follows_rows,
    gather_rows,
    numbers_of,
    shares_columns,
    stored,
    valued,
)
from lightning_adapm.state.packed import PACKED, pack, put_together, unpack
from lightning_adapm.step.parts import Part, new_state

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def export_state(parts: Parts, state: Mapping[str, Any], all_parts: Callable[[], Iterable[Parts]]) -> Mapping[str, Any]:
    """Export the state of one parameter for a state dict. Call it on every process that holds a part of it.

    Args:
        parts: Parts of the parameter.
        state: Its state on this process.
        all_parts: Parts of all parameters of the optimizer.
    """
    param, layout = parts[0].param, parts[0].layout
    if layout is None:
        return state
    if not is_dtensor(param):
        return {"step": state["step"], **pack(parts, decoded(state), layout, all_parts)}
    known = [(part, entry, form_of(part, key, entry)) for part, key, entry in entries_of(parts)]
    as_they_are = {name: state[name] for _, entry, form in known if entry.storage.rowwise for name in form}
    exported = as_they_are | decoded({name: value for name, value in state.items() if name not in as_they_are})
    for part, entry, form in known:
        for name, whole in form.items():
            if follows_rows(part, entry):
                exported[name] = _dtensor(_as_a_dtensors(part, exported[name], layout), param, 0, whole)
            elif shares_columns(part, entry):
                exported[name] = _dtensor(exported[name], param, 1, whole)
    return exported


def form_of(part: Part, key: str, entry: Entry) -> dict[str, Tensor]:
    """Tensors on the meta device like those of a sharded parameter's entry in a state dict, of whole shapes."""
    return (stored if entry.storage.rowwise else valued)(part, key, entry)


def _as_a_dtensors(part: Part, rows: Tensor, layout: Layout) -> Tensor:
    """Rows of an entry that a DTensor keeps on this process; those of a part of a fused weight lie elsewhere."""
    if part.shard is None or _aligned(part):
        return rows
    size = -(-part.shard.size // len(layout.spans))
    return gather_rows(part.shard, rows)[size * layout.rank : size * (layout.rank + 1)].clone()


def _dtensor(part: Tensor, param: "DTensor", dim: int, whole: Tensor) -> "DTensor":
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(dim) if kind == Shard(0) else kind for kind in param.placements]
    return DTensor.from_local(
        part, param.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def import_entry(parts: Parts, entry: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Import a saved entry in the form of one device, with sharded or whole tensors; None where nothing was saved.

    Call it on every process that holds a part of the parameter; under FSDP1 each has a part of the entry.

    Raises:
        ValueError: FSDP1 has cut a state that was saved with other settings.
    """
    layout = parts[0].layout
    if layout is not None and not is_dtensor(parts[0].param):
        entry = put_together(parts, entry, layout)
    if not entry:
        return None
    # FSDP1 gives tensors without dimensions as numbers
    entry = {key: torch.tensor(value) if isinstance(value, float) else value for key, value in entry.items()}
    if PACKED + "0" not in entry:
        return entry
    packed = torch.cat([_full(entry[key]).flatten() for key in sorted(entry) if key.startswith(PACKED)])
    return {**unpack(parts, packed), "step": entry["step"]}


def localize(parts: Parts, whole: Mapping[str, Any]) -> dict[str, Any]:
    """Copy this process's share of the state of a whole parameter, given as DTensors or whole tensors."""
    state, values = new_state(parts, local(parts[0].param).device), dict(whole)
    state["step"].copy_(_full(torch.as_tensor(values["step"])))
    for part, key, entry in entries_of(parts):
        names = stored(part, key, entry)
        if entry.storage.rowwise and names.keys() <= values.keys():
            for name in names:
                state[name].copy_(_held_value(part, entry, values[name]))
        else:
            coded = {name: _full(values[name]) for name in names if name != key and name in values}
            values |= decoded(coded)
            entry.storage.write([state], key, [_held_value(part, entry, values[key])])
    for part, moment, numbers in numbers_of(parts):
        prefix = part.piece.prefix
        found = {key: values[prefix + key] for key in numbers}
        if part.shard is None and part.is_shared:  # of the matrices of a stack that are held here
            held = decoded(state)
            found = moment.numbers({key: held[prefix + key] for key in moment.entries(part.shape)})
        state |= {prefix + key: int(number) for key, number in found.items()}
    return state


def _held_value(part: Part, entry: Entry, value: Tensor) -> Tensor:
    """Select this process's share of the value of an entry."""
    layout = part.layout
    assert layout is not None
    if follows_rows(part, entry):
        if is_dtensor(value) and _aligned(part):
            return value.to_local()
        if part.shard is not None:
            return _held(part.shard, _full(value))
        inner = layout.shape[1:].numel()  # of a stack of matrices
        return _full(value)[layout.held[0] // inner : layout.held[1] // inner]
    value = _full(value)
    return value[..., slice(*part.kept)] if shares_columns(part, entry) and part.kept is not None else value


def fits(parts: Parts, saved: Mapping[str, Any]) -> bool:
    """Whether a saved entry has the keys and shapes of the whole parameter's state, as it is stored or as values."""
    known = {part.piece.prefix + key for part, _, keys in numbers_of(parts) for key in keys} | {"step"}
    for part, key, entry in entries_of(parts):
        shapes = (valued if key in saved else stored)(part, key, entry)
        if any(name not in saved or torch.as_tensor(saved[name]).shape != each.shape for name, each in shapes.items()):
            return False
        known |= shapes.keys()
    return known == saved.keys()


def full_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Gather the tensors of a saved entry."""
    return {key: _full(value) if isinstance(value, Tensor) else value for key, value in entry.items()}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def _aligned(part: Part) -> bool:
    """Whether the rows of a part lie on the processes as a DTensor's would: those of a fused weight do not."""
    return part.shard is None or part.piece.whole or part.piece.transposed


def _held(shard: RowShard, full: Tensor) -> Tensor:
    rows = full[shard.first : shard.first + shard.count]
    return shard.held_only(rows) if full.dim() == 2 and full.shape[-1] == shard.width else rows
