"""State under FSDP1, which supports only tensors like its flat parameters, with the same names for every parameter.

All state of a parameter becomes one vector. Filled with zeros, it is cut into ``packed_0``, ``packed_1``, ... of the
parameter's shape.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adapm.sharding.find import shape_of
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.reduction import ProcessReduction
from lightning_adapm.state.entries import (
    Parts,
    entries_of,
    gather_rows,
    numbers_of,
    shares_columns,
    stored,
    valued,
    whole_shapes,
)

PACKED = "packed_"


def pack(
    parts: Parts, values: Mapping[str, Any], layout: Layout, all_parts: Callable[[], Iterable[Parts]]
) -> dict[str, Tensor]:
    """Pack this process's part of all state of a parameter into tensors."""
    vectors: dict[str, Tensor] = {}
    for part, key, entry in entries_of(parts):
        vectors[key] = values[key]
        if part.shard is not None and entry.rows:
            vectors[key] = gather_rows(part.shard, values[key])
        elif part.shard is not None and shares_columns(part, entry):
            vectors[key] = ProcessReduction([part.shard], columns_shared=True).columns(values[key], part.shard.width)
    numel = layout.shape.numel()
    packed = torch.zeros(_count(all_parts()) * numel, dtype=parts[0].exact, device=parts[0].param.device)
    place = 0
    for key in sorted(vectors):
        packed[place : place + vectors[key].numel()] = vectors[key].flatten()
        place += vectors[key].numel()
    first, last = layout.held
    return {f"{PACKED}{i}": part[first:last].clone() for i, part in enumerate(packed.view(-1, numel))}


def unpack(parts: Parts, packed: Tensor) -> dict[str, Any]:
    """Unpack the values of a whole parameter's state from its vector.

    Raises:
        ValueError: It was packed with other settings.
    """
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
    for part, moment, numbers in numbers_of(parts):
        prefix = part.piece.prefix
        state = {key: entry[prefix + key] for key in moment.entries(part.shape) if key not in numbers}
        entry |= {prefix + key: number for key, number in moment.numbers(state).items()}
    return entry


def _count(all_parts: Iterable[Parts]) -> int:
    """Number of tensors of a parameter's shape that hold the state of any parameter, the same for all of them."""
    count = 1
    for parts in all_parts:
        numel = sum(value.numel() for value in whole_shapes(parts).values())
        count = max(count, -(-numel // max(1, shape_of(parts[0].param).numel())))
    return count


def put_together(parts: Parts, entry: Mapping[str, Any] | None, layout: Layout) -> dict[str, Any] | None:
    """Put the entries of a saved state together that FSDP1 has cut up; None where nothing was saved.

    Whatever a saved tensor's shape, FSDP1 gives each process the elements at the process's places in the parameter, in
    row-major order. Nothing is lost, because no entry is larger than its parameter.

    Raises:
        ValueError: An entry has another size than this optimizer's, and its shape is not saved.
    """
    first, _ = layout.held
    tensors = {
        key: value.flatten() for key, value in (entry or {}).items() if isinstance(value, Tensor) and value.dim()
    }
    ends = {key: first + value.numel() if value.numel() else 0 for key, value in tensors.items()}
    numbers = {key: torch.as_tensor(value).item() for key, value in (entry or {}).items() if key not in tensors}
    found: list[Any] = [None] * len(layout.spans)
    dist.all_gather_object(found, (ends, numbers), group=layout.group)
    whole: dict[str, Any] = next((others for _, others in found if others), {})
    if not whole:
        return None
    shapes = {
        name: value.shape for each in entries_of(parts) for name, value in (valued(*each) | stored(*each)).items()
    }
    for key in sorted({key for others, _ in found for key in others}):
        size = max(others.get(key, 0) for others, _ in found)
        flat = torch.zeros(size, dtype=torch.float64, device=parts[0].param.device)
        if ends.get(key):
            flat[first : first + tensors[key].numel()] = tensors[key]
        dist.all_reduce(flat, group=layout.group)
        whole[key] = flat.view(_shape_of_entry(key, size, shapes.get(key), layout))
    return whole


def _shape_of_entry(key: str, size: int, shape: torch.Size | None, layout: Layout) -> torch.Size:
    """Shape of a saved entry with ``size`` elements: this optimizer's ``shape`` for it, or else the parameter's.

    Raises:
        ValueError: Neither has as many elements.
    """
    for each in (shape, layout.shape):
        if each is not None and each.numel() == size:
            return each
    held = "none" if shape is None else f"the shape {tuple(shape)}"
    raise ValueError(
        f"{key} of the saved state has {size} elements, where this optimizer's has {held}: it was saved with another"
        " rank, second moment or policy, and FSDP1 does not show its shape. Load it with the settings it was saved"
        " with, or on a single device, with DDP or with FSDP2, which convert it"
    )
