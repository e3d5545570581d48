"""Entries of a parameter's state as its moments declare them, on one device and on many."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adapm.moments.base import Moment
from lightning_adapm.moments.storage import Entry
from lightning_adapm.sharding.rows import RowShard
from lightning_adapm.step.parts import Part

Parts = tuple[Part, ...]
_META = torch.device("meta")


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
    """Tensors on the meta device like those in which an entry of the whole parameter is stored, by key."""
    return entry.storage.make(key, entry.shape or torch.Size(()), torch.empty((), dtype=part.exact, device=_META))


def valued(part: Part, key: str, entry: Entry) -> dict[str, Tensor]:
    """A tensor on the meta device like the value of an entry of the whole parameter, by key."""
    return {key: torch.empty(entry.shape or (), dtype=entry.storage.dtype or part.exact, device=_META)}


def whole_shapes(parts: Parts) -> dict[str, Tensor]:
    """Tensors on the meta device like the values of all entries of the whole parameter, by key."""
    shapes: dict[str, Tensor] = {}
    for part, key, entry in entries_of(parts):
        shapes |= valued(part, key, entry)
    return shapes


def numbers_of(parts: Parts) -> Iterator[tuple[Part, Moment, list[str]]]:
    """Moments that keep numbers on the host, with their part and the numbers' keys."""
    for part in parts:
        for moment in (part.first, part.second):
            if keys := [key for key, entry in moment.entries(part.shape).items() if entry.shape is None]:
                yield part, moment, keys


def gather_rows(shard: RowShard, rows: Tensor) -> Tensor:
    """Gather all rows of a matrix's state, as a sum over processes."""
    if rows.shape[-1] != shard.width and not shard.owns_first:  # one value for a row that begins on another process
        rows = torch.cat([torch.zeros_like(rows[:1]), rows[1:]])
    full = rows.new_zeros(shard.size, *rows.shape[1:])
    full[shard.first : shard.first + shard.count] = rows
    dist.all_reduce(full, group=shard.layout.group)
    return full
