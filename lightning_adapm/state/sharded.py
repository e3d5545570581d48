"""Sharded state: saved as if one device had trained, and loaded on any number of processes.

In memory a process holds plain tensors with its own rows. A state dict holds tensors that the parameters' strategy can
save and shard again.

- FSDP2: DTensors of the shapes on one device, sharded along their first dimension. State that is equal on all processes
  is a plain tensor.
- FSDP1 supports only tensors like its flat parameters, with the same names for every parameter. All state of a
  parameter becomes one vector, cut into ``packed_0``, ``packed_1``, ... of the parameter's shape and filled with zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adapm.moments.base import Moment
from lightning_adapm.moments.storage import Entry, decoded
from lightning_adapm.sharding.find import is_dtensor, local, shape_of
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.reduction import ProcessReduction
from lightning_adapm.sharding.rows import RowShard
from lightning_adapm.step.parts import Part, new_state

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Parts = tuple[Part, ...]
_META = torch.device("meta")
_PACKED = "packed_"


def export_state(parts: Parts, state: Mapping[str, Any], all_parts: Callable[[], Iterable[Parts]]) -> Mapping[str, Any]:
    """The state of one parameter for a state dict; to be called on every process that holds a part of it.

    Args:
        parts: What the parameter consists of.
        state: Its state on this process.
        all_parts: Parts of all parameters of the optimizer.
    """
    param, layout = parts[0].param, parts[0].layout
    if layout is None:
        return state
    if not is_dtensor(param):
        return {"step": state["step"], **_pack(parts, decoded(state), layout, all_parts)}
    known = [(part, entry, form_of(part, key, entry)) for part, key, entry in entries_of(parts)]
    as_they_are = {name: state[name] for _, entry, form in known if entry.storage.rowwise for name in form}
    exported = as_they_are | decoded({name: value for name, value in state.items() if name not in as_they_are})
    for part, entry, form in known:
        for name, whole in form.items():
            if follows_rows(part, entry):
                rows = exported[name]
                if part.shard is not None and not _aligned(part):
                    size = -(-part.shard.size // len(layout.spans))  # what a DTensor keeps on each process
                    rows = _gather(part.shard, rows)[size * layout.rank : size * (layout.rank + 1)].clone()
                exported[name] = _dtensor(rows, param, 0, whole)
            elif shares_columns(part, entry):
                exported[name] = _dtensor(exported[name], param, 1, whole)
    return exported


def entries_of(parts: Parts) -> Iterator[tuple[Part, str, Entry]]:
    """Every entry of a parameter that is a tensor, with its part and its key in the parameter's state."""
    for part in parts:
        for key, entry in part.entries.items():
            if entry.shape is not None:
                yield part, part.piece.prefix + key, entry


def follows_rows(part: Part, entry: Entry) -> bool:
    """Whether an entry is sharded along its first dimension, as the rows of the matrix or the stack of matrices are."""
    return entry.rows if part.shard is not None else len(part.shape) == 3 or entry.rows


def shares_columns(part: Part, entry: Entry) -> bool:
    """Whether each process keeps some columns of an entry."""
    return entry.columns and part.kept is not None


def stored(part: Part, key: str, entry: Entry) -> dict[str, Tensor]:
    """Tensors on the meta device as those that an entry of the whole parameter is stored in, by key."""
    return entry.storage.make(key, entry.shape or torch.Size(()), torch.empty((), dtype=part.exact, device=_META))


def valued(part: Part, key: str, entry: Entry) -> dict[str, Tensor]:
    """A tensor on the meta device as the value of an entry of the whole parameter, by its key."""
    return {key: torch.empty(entry.shape or (), dtype=entry.storage.dtype or part.exact, device=_META)}


def form_of(part: Part, key: str, entry: Entry) -> dict[str, Tensor]:
    """Tensors on the meta device as those of the whole parameter's entry in the state dict of a sharded one."""
    return (stored if entry.storage.rowwise else valued)(part, key, entry)


def whole_shapes(parts: Parts) -> dict[str, Tensor]:
    """Tensors on the meta device as the values of the whole parameter's entries, by key."""
    shapes: dict[str, Tensor] = {}
    for part, key, entry in entries_of(parts):
        shapes |= valued(part, key, entry)
    return shapes


def _numbers(parts: Parts) -> Iterator[tuple[Part, Moment, list[str]]]:
    """Moments that keep numbers on the host, with their part and the numbers' keys."""
    for part in parts:
        for moment in (part.first, part.second):
            if keys := [key for key, entry in moment.entries(part.shape).items() if entry.shape is None]:
                yield part, moment, keys


def _dtensor(part: Tensor, param: "DTensor", dim: int, whole: Tensor) -> "DTensor":
    from torch.distributed.tensor import DTensor, Shard

    placements = [Shard(dim) if kind == Shard(0) else kind for kind in param.placements]
    return DTensor.from_local(
        part, param.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def import_entry(
    parts: Parts, entry: Mapping[str, Any] | None, all_parts: Callable[[], Iterable[Parts]]
) -> dict[str, Any] | None:
    """A saved entry with a state dict's tensors for one device, sharded or not; None where nothing was saved.

    Call it on every process that holds a part of the parameter; under FSDP1 each has a part of the entry.

    Raises:
        ValueError: FSDP1 has cut a state that was saved with other settings.
    """
    layout = parts[0].layout
    if layout is not None and not is_dtensor(parts[0].param):
        entry = _whole_entry(parts, entry, layout)
    if not entry:
        return None
    # FSDP1 gives tensors without dimensions as numbers
    entry = {key: torch.tensor(value) if isinstance(value, float) else value for key, value in entry.items()}
    if _PACKED + "0" not in entry:
        return entry
    packed = torch.cat([_full(entry[key]).flatten() for key in sorted(entry) if key.startswith(_PACKED)])
    return {**_unpack(parts, packed), "step": entry["step"]}


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
    for part, moment, numbers in _numbers(parts):
        prefix = part.piece.prefix
        found = {key: values[prefix + key] for key in numbers}
        if part.shard is None and part.is_shared:  # of the matrices of a stack that are held here
            held = decoded(state)
            found = moment.numbers({key: held[prefix + key] for key in moment.entries(part.shape)})
        state |= {prefix + key: int(number) for key, number in found.items()}
    return state


def _held_value(part: Part, entry: Entry, value: Tensor) -> Tensor:
    """Share of this process in the value of an entry."""
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
    known = {part.piece.prefix + key for part, _, keys in _numbers(parts) for key in keys} | {"step"}
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
    parts: Parts, values: Mapping[str, Any], layout: Layout, all_parts: Callable[[], Iterable[Parts]]
) -> dict[str, Tensor]:
    """This process's part of all state of a parameter."""
    vectors: dict[str, Tensor] = {}
    for part, key, entry in entries_of(parts):
        vectors[key] = values[key]
        if part.shard is not None and entry.rows:
            vectors[key] = _gather(part.shard, values[key])
        elif part.shard is not None and shares_columns(part, entry):
            vectors[key] = ProcessReduction([part.shard], columns_shared=True).columns(values[key], part.shard.width)
    numel = layout.shape.numel()
    packed = torch.zeros(_count(all_parts()) * numel, dtype=parts[0].exact, device=parts[0].param.device)
    place = 0
    for key in sorted(vectors):
        packed[place : place + vectors[key].numel()] = vectors[key].flatten()
        place += vectors[key].numel()
    first, last = layout.held
    return {f"{_PACKED}{i}": part[first:last].clone() for i, part in enumerate(packed.view(-1, numel))}


def _unpack(parts: Parts, packed: Tensor) -> dict[str, Any]:
    shapes, place, entry = whole_shapes(parts), 0, dict[str, Any]()
    for key in sorted(shapes):
        shape = shapes[key].shape
        entry[key] = packed[place : place + shape.numel()].view(shape)
        place += shape.numel()
    if packed[place:].any():
        raise ValueError(
            "the saved state is FSDP1's, of an optimizer with another rank, second moment or policy; load it with the"
            " settings it was saved with"
        )
    for part, moment, numbers in _numbers(parts):
        prefix = part.piece.prefix
        state = {key: entry[prefix + key] for key in moment.entries(part.shape) if key not in numbers}
        entry |= {prefix + key: number for key, number in moment.numbers(state).items()}
    return entry


def _count(all_parts: Iterable[Parts]) -> int:
    """Tensors of a parameter's shape that hold the state of any: the same number for all of them."""
    count = 1
    for parts in all_parts:
        numel = sum(value.numel() for value in whole_shapes(parts).values())
        count = max(count, -(-numel // max(1, shape_of(parts[0].param).numel())))
    return count


def _whole_entry(parts: Parts, entry: Mapping[str, Any] | None, layout: Layout) -> dict[str, Any] | None:
    """Put together again what FSDP1 has cut up.

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
        name: value.shape for each in entries_of(parts) for name, value in (valued(*each) | stored(*each)).items()
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
        flat = torch.zeros(size, dtype=torch.float64, device=parts[0].param.device)
        if mine.get(key):
            flat[first : first + tensors[key].numel()] = tensors[key]
        dist.all_reduce(flat, group=layout.group)
        whole[key] = flat.view(shape)
    return whole
