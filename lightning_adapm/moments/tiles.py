"""Tiles: some rows of a tensor at a time, so that temporaries are of a bounded size."""

from collections.abc import Iterator

from torch import Tensor

TILE_NUMEL = 1 << 22
"""Maximum number of elements of a tile, unless a single row has more.

A table of tokens can have 1e9 elements, and temporaries of its size would be larger than all the state that is saved.
"""

_CACHED_NUMEL = 1 << 19
"""The same on a CPU, whose caches are to hold what is computed with a tile, also where processes share them."""


def tile_numel(tensor: Tensor) -> int:
    """Maximum number of elements of a tile of ``tensor``."""
    return min(TILE_NUMEL, _CACHED_NUMEL) if tensor.device.type == "cpu" else TILE_NUMEL


def spans(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the rows of each tile of a tensor, along its first dimension: the first, and the one after the last."""
    count = max(1, tile_numel(tensor) // max(1, tensor[:1].numel()))
    for first in range(0, len(tensor), count):
        yield first, min(first + count, len(tensor))
