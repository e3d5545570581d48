"""Orthogonal updates by :mod:`lightning_adapm.step.triton_orthogonal`, as :mod:`lightning_adapm.moments.orthogonal`.

The direction is written once, in the dtype of products, and :mod:`lightning_adapm.step.newton_schulz` overwrites it.
"""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from lightning_adapm.moments.base import Direction
from lightning_adapm.moments.batches import split
from lightning_adapm.moments.orthogonal import Iteration, sized
from lightning_adapm.moments.quantized import BLOCK
from lightning_adapm.sharding.collectives import Planned, summing
from lightning_adapm.sharding.owners import Owners
from lightning_adapm.sharding.reduction import ProcessReduction, Reduction
from lightning_adapm.step import kernels
from lightning_adapm.step.kernels import Tile
from lightning_adapm.step.launch import Matrices, aligned, launch
from lightning_adapm.step.moves import Average
from lightning_adapm.step.newton_schulz import NORM, is_half, iterated, iterated_in_half, rescale

DIRECT, DIRECT_ALONG = (2, 1024, 4, 3), (64, 64, 4, 3)
"""Rows and columns of a tile, warps, stages: without a product of factors and with it. Blocks of codes with one scale
are not cut.
"""
_TILES = 1024
"""Numbers of tiles that a program adds at once."""
_ORDINARY = 1e-15, 1e15
"""Norms whose squares neither over- nor underflow: they are divided out of small matrices, which saves a pass."""


def direct(
    grads: Matrices,
    flaws: Tensor,
    average: Average | None,
    factors: tuple[Tensor, Matrices] | None,
    share: float,
) -> tuple[Tensor, Tensor]:
    """Directions ``(b, m, n)`` in the dtype of products, and their squared norms ``(b,)`` in float64.

    Args:
        grads: Gradients; those with ``flaws`` count as zero.
        flaws: Flaws of the gradients, of which a stack has one.
        average: Full momentum, which takes the gradients.
        factors: Factors of what low-rank momentum differs in from the gradient.
        share: Share of the momentum in the direction; the rest is the gradient.
    """
    (m, n), b = grads.shape, len(grads.addresses)
    left, right = factors or (None, None)
    values, beta1, scales = average or (None, 0.0, None)
    tile = Tile(*DIRECT).narrowed(n) if factors is None else Tile(*DIRECT_ALONG)
    high, across, _ = tile.grid(m, n, b)
    found = grads.like.new_empty((b, m, n), dtype=kernels.FACTOR)
    sizes = grads.like.new_empty((b, 2, high * across), dtype=torch.float32)
    launch(
        "direct",
        (high * across, b, 1),
        (grads, values, scales, left, right, flaws, found, sizes),
        (
            m,
            n,
            0 if right is None else right.shape[0],
            0 if left is None else left.shape[-1],
            grads.stride,
            b // len(flaws),
        ),
        (beta1, share),
        GRAD=grads.dtype,
        AVERAGE=(values or grads).dtype,
        RIGHT=(right or grads).dtype,
        FACTOR=kernels.FACTOR,
        ALIGNED=aligned(grads, values, right),
        AVERAGED=average is not None,
        SPAN=0 if scales is None else min(BLOCK, tile.columns),
        FACTORS=factors is not None,
        BLOCK_K=64,
        **tile.constants,
    )
    squares = grads.like.new_empty(b, dtype=torch.float64)
    launch("norms", (b, 1, 1), (sizes, squares), (sizes.shape[-1],), (), BLOCK=_TILES)
    return found, squares


def updates(
    found: Tensor, squares: Tensor, iteration: Iteration, like: list[Tensor], reduction: Reduction
) -> Generator[Sequence[Planned], None, Direction]:
    """Updates along directions, which are found when the generator returns; it yields what it has to wait for.

    Args:
        found: Directions ``(b, m, n)`` in the dtype of products, which are overwritten. Of shards, the rows of this
            process; no row is cut.
        squares: Their squared norms ``(b,)`` in float64, which are completed.
        iteration: Steps of Newton-Schulz.
        like: Matrices and stacks of them, one for each part.
        reduction: Completion of sums over rows.
    """
    if not isinstance(reduction, ProcessReduction):
        return updates_of_whole(found, squares, iteration, like)
    owners = Owners(reduction.shards, found.dtype)
    planned, collected = owners.collect(found)
    yield [summing(squares, reduction.group), *planned]
    orthogonal = _orthogonalized(collected(), owners.mine(squares), iteration)
    planned, given_back = owners.give_back(orthogonal, found.view(orthogonal.dtype))
    del collected, orthogonal  # which hold the matrices
    yield planned
    return sized(given_back(), reduction.shards[0].size)


def updates_of_whole(found: Tensor, squares: Tensor, iteration: Iteration, like: list[Tensor]) -> Direction:
    """:func:`updates` along directions of whole matrices."""
    return sized(split(_orthogonalized(found, squares, iteration), like), found.shape[-2])


def _orthogonalized(found: Tensor, squares: Tensor, iteration: Iteration) -> Tensor:
    """Orthogonal matrices by Newton-Schulz; zero where that is impossible. ``found`` is overwritten."""
    half = is_half(found, iteration)
    b = len(squares)
    rescaled, inverses = (squares.new_empty(b, dtype=torch.float32) for _ in range(2))
    tiny = torch.finfo(torch.float32).tiny * (NORM if half else 1.0)  # factors of smaller norms would be infinite
    launch("scales", (-(-b // _TILES), 1, 1), (squares, rescaled, inverses), (b,), (*_ORDINARY, tiny), BLOCK=_TILES)
    if half:
        return iterated_in_half(rescale(found, rescaled * inverses * NORM, torch.float16), iteration)
    return iterated(rescale(found, rescaled), iteration, inverses)
