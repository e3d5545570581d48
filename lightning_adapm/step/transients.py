"""Bound of what a step on a GPU allocates and frees again, computed from shapes."""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

import torch

from lightning_adapm.moments.tiles import TILE_NUMEL
from lightning_adapm.step import kernels as step_kernels
from lightning_adapm.step.batching import EXCHANGED, most_together
from lightning_adapm.step.launch import DTYPES
from lightning_adapm.step.orthogonal import DIRECT
from lightning_adapm.step.parts import Part
from lightning_adapm.step.paths import unknown_moments
from lightning_adapm.step.refreshing import TOGETHER_NUMEL

_FACTORS = 8
"""Copies of the left factors of matrices that step together, all in float32, in a first step."""

_COPIES = 2
"""Copies in float32 of matrices that step together by torch's operations. An assumption."""

_DIRECTIONS, _SQUARES = 3, 5
"""Copies of matrices that are orthogonalized, and of their Gram matrices, in the dtype of products."""

_WAITING = 2
"""Batches whose matrices are exchanged between processes while another one is worked on."""

_TILES = 6
"""Tiles in float32 that a monitor holds."""


def step_transients(parts: Iterable[Part], in_backward: bool = False) -> int:
    """Bound of the bytes that a step on one GPU holds for a moment, besides weights, gradients and state.

    It is that of docs/training.md, for gradients in the dtype of their parameters, with a monitor.

    Args:
        parts: All parts that are trained.
        in_backward: Whether blocks of parameters move as soon as their gradients are complete.
    """
    moving: defaultdict[Hashable, list[Part]] = defaultdict(list)
    largest = 0
    for part in parts:
        moving[part.piece.block if in_backward else None].append(part)
        largest = max(largest, part.shape.numel())
    return max(map(held_by_a_step, moving.values()), default=0) + 4 * _TILES * min(TILE_NUMEL, largest)


def held_by_a_step(parts: Sequence[Part]) -> int:
    """Bound for parts that move in one step: batches come one after another, the next bases of all before them."""
    alike: defaultdict[Hashable, list[Part]] = defaultdict(list)
    for part in parts:
        alike[part.alike].append(part)
    batches, bases, products, waiting = [], 0, 0, 0
    for bucket in alike.values():
        part = bucket[0]
        shape = part.shape if part.shard is None else torch.Size((part.shard.most, *part.shape[1:]))
        kernels = part.param.dtype in DTYPES and not unknown_moments(part)
        whole = kernels and part.second.whole_matrices
        numel = shape.numel() * (EXCHANGED if whole and part.shard is not None else 1)
        together = min(len(bucket), most_together(numel, "cuda", kernels, due=True, whole=whole))
        needed = 0
        if whole:
            owners = 1 if part.shard is None else len(part.shard.layout.spans)  # of which each has some matrices
            needed = -(-together // owners) * _of_whole_matrices(part.shape)
            if part.shard is not None:
                needed += together * _of_whole_matrices(shape)
                rows = together * shape.numel() + -(-together // owners) * part.shape.numel()
                waiting = max(waiting, _WAITING * rows * step_kernels.FACTOR.itemsize)
        if not kernels:
            needed = 4 * _COPIES * together * shape.numel()
        elif part.first.has_basis:
            entries = part.first.entries(shape)
            left, right = ((entries[key].shape or shape).numel() for key in ("exp_avg_l", "exp_avg_r"))
            needed += 4 * _FACTORS * together * left
            bases += right * len(bucket)
            products += left * len(bucket) if part.shard is not None else 0  # read before any of them moves
        batches.append(needed)
    in_float64 = 4 * min(bases, TOGETHER_NUMEL)  # as they are made orthonormal, and products of them
    return max(batches, default=0) + waiting + 4 * (bases + products) + 8 * in_float64


def _of_whole_matrices(shape: torch.Size) -> int:
    """Directions, a copy for a monitor, updates, and square matrices of Newton-Schulz; sizes of tiles."""
    m, n = shape[-2:]
    stack = shape[:-2].numel()
    square = _SQUARES * min(m, n) ** 2
    tiles = -(-m // DIRECT[0]) * -(-n // DIRECT[1])
    product = step_kernels.FACTOR.itemsize
    return stack * (product * (_DIRECTIONS * m * n + square) + 40 * tiles)
