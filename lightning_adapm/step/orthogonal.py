"""Orthogonal updates by :mod:`lightning_adapm.step.triton_orthogonal`, as :mod:`lightning_adapm.moments.orthogonal`.

The direction is written once, in the dtype of products, and :mod:`lightning_adapm.step.newton_schulz` overwrites it.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

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
from lightning_adapm.step.reading import Reading

DIRECT, DIRECT_ALONG = (2, 1024, 4, 3), (64, 64, 4, 3)
"""Rows and columns of a tile, warps, stages: without a product of factors and with it. Blocks of codes with one scale
are not cut.
"""
_TILES = 1024
"""Numbers of tiles that a program adds at once."""
_ORDINARY = 1e-15, 1e15
"""Norms whose squares neither over- nor underflow: they are divided out of small matrices, which saves a pass."""
_PARTS, _BOUNDED = 64, 128
"""Parts of a matrix whose norms are bounded by a program each, and the rows or columns that it reads at a time."""


class Scaled(NamedTuple):
    """Directions in float16 that are multiplied by factors."""

    factors: Tensor
    """Factors ``(b,)``, 0 of directions that give no update."""
    squares: Tensor
    """Squared norms ``(b,)`` of the products, in float32."""


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
    found, sizes = _directed(grads, flaws, average, factors, share, None)
    return found, _squares(sizes)


def direct_in_half(
    grads: Matrices,
    reading: Reading,
    factors: tuple[Tensor, Matrices] | None,
    lengths: Tensor | None,
    share: float,
) -> tuple[Tensor, Scaled]:
    """Directions ``(b, m, n)`` in float16, scaled so that none of their norms is above 2 :data:`NORM`.

    Norms are bounded by what is known of gradients and factors, so that directions are written once.

    Args:
        grads: Gradients.
        reading: What a reading has found out about them.
        factors: As for :func:`direct`.
        lengths: Sums of squares of the rows of the left factor, ``(b, m)``.
        share: As for :func:`direct`.
    """
    (m, n), b = grads.shape, len(grads.addresses)
    left = None if factors is None else factors[0]
    rows = -(-m // _PARTS)
    sizes = grads.like.new_empty((b, 2, -(-m // rows)), dtype=torch.float32)
    low, high = _ORDINARY
    launch(
        "bound",
        (sizes.shape[-1], b, 1),
        (grads, reading.squares, left, lengths, reading.flaws, sizes),
        (m, n, 0 if left is None else left.shape[-1], grads.stride, b // len(reading.flaws), rows),
        (low**2, high**2),
        GRAD=grads.dtype,
        ALIGNED=grads.aligned,
        FACTORS=left is not None,
        BLOCK=_BOUNDED,
    )
    rescaled, inverses = _inverses(_squares(sizes), NORM)
    scales = rescaled.mul_(inverses).mul_(NORM)
    found, sums = _directed(grads, reading.flaws, None, factors, share, scales)
    return found, Scaled(scales, sums.sum(dim=-1))


def unscaled(found: Tensor, sizes: Tensor | Scaled) -> Tensor:
    """A copy of directions that :func:`direct` or :func:`direct_in_half` has found, as they were before scaling."""
    if isinstance(sizes, Tensor):
        return found.clone()
    inverse = torch.where(sizes.factors > 0, sizes.factors, torch.inf).reciprocal()
    return found.to(kernels.FACTOR).mul_(inverse.to(kernels.FACTOR)[:, None, None])


def _directed(
    grads: Matrices,
    flaws: Tensor,
    average: Average | None,
    factors: tuple[Tensor, Matrices] | None,
    share: float,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Directions ``(b, m, n)``, with ``scales`` ``(b,)`` in float16; and sizes of their tiles."""
    (m, n), b = grads.shape, len(grads.addresses)
    left, right = factors or (None, None)
    values, beta1, codes = average or (None, 0.0, None)
    tile = Tile(*DIRECT).narrowed(n) if factors is None else Tile(*DIRECT_ALONG)
    high, across, _ = tile.grid(m, n, b)
    tiles = high * across
    found = grads.like.new_empty((b, m, n), dtype=kernels.FACTOR if scales is None else torch.float16)
    sizes = grads.like.new_empty((b, 2, tiles) if scales is None else (b, tiles), dtype=torch.float32)
    launch(
        "direct",
        (tiles, b, 1),
        (grads, values, codes, left, right, flaws, scales, found, sizes),
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
        RESULT=found.dtype,
        ALIGNED=aligned(grads, values, right),
        AVERAGED=average is not None,
        SPAN=0 if codes is None else min(BLOCK, tile.columns),
        FACTORS=factors is not None,
        SCALED=scales is not None,
        BLOCK_K=64,
        **tile.constants,
    )
    return found, sizes


def _squares(sizes: Tensor) -> Tensor:
    """Squared norms ``(b,)`` in float64, by the ``sizes`` ``(b, 2, parts)`` of parts."""
    squares = sizes.new_empty(len(sizes), dtype=torch.float64)
    launch("norms", (len(sizes), 1, 1), (sizes, squares), (sizes.shape[-1],), (), BLOCK=_TILES)
    return squares


def updates(
    found: Tensor, squares: Tensor | Scaled, iteration: Iteration, like: list[Tensor], reduction: Reduction
) -> Generator[Sequence[Planned], None, Direction]:
    """Updates along directions, which are found when the generator returns; it yields what it has to wait for.

    Args:
        found: Directions ``(b, m, n)`` in the dtype of products, which are overwritten. Of shards, the rows of this
            process; no row is cut.
        squares: Their squared norms ``(b,)`` in float64, which are completed; of whole matrices, how they are scaled.
        iteration: Steps of Newton-Schulz.
        like: Matrices and stacks of them, one for each part.
        reduction: Completion of sums over rows.
    """
    if not isinstance(reduction, ProcessReduction):
        return updates_of_whole(found, squares, iteration, like)
    assert isinstance(squares, Tensor)
    owners = Owners(reduction.shards, found.dtype)
    planned, collected = owners.collect(found)
    yield [summing(squares, reduction.group), *planned]
    orthogonal = _orthogonalized(collected(), owners.mine(squares), iteration)
    planned, given_back = owners.give_back(orthogonal, found.view(orthogonal.dtype))
    del collected, orthogonal  # which hold the matrices
    yield planned
    return sized(given_back(), reduction.shards[0].size)


def updates_of_whole(found: Tensor, squares: Tensor | Scaled, iteration: Iteration, like: list[Tensor]) -> Direction:
    """:func:`updates` along directions of whole matrices."""
    return sized(split(_orthogonalized(found, squares, iteration), like), found.shape[-2])


def _orthogonalized(found: Tensor, squares: Tensor | Scaled, iteration: Iteration) -> Tensor:
    """Orthogonal matrices by Newton-Schulz; zero where that is impossible. ``found`` is overwritten."""
    if isinstance(squares, Scaled):
        return iterated_in_half(found, iteration, squares.squares)
    if is_half(found.shape, found.dtype, iteration):
        rescaled, inverses = _inverses(squares, NORM)
        return iterated_in_half(rescale(found, rescaled * inverses * NORM, torch.float16), iteration)
    rescaled, inverses = _inverses(squares, 1.0)
    return iterated(rescale(found, rescaled), iteration, inverses)


def _inverses(squares: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Factors ``(b,)`` of matrices, and of what is computed from them, that give matrices of these ``squares`` of norms
    a norm of 1, and are 0 where a factor with which it is ``norm`` would be infinite.
    """
    b = len(squares)
    rescaled, inverses = (squares.new_empty(b, dtype=torch.float32) for _ in range(2))
    tiny = torch.finfo(torch.float32).tiny * norm
    launch("scales", (-(-b // _TILES), 1, 1), (squares, rescaled, inverses), (b,), (*_ORDINARY, tiny), BLOCK=_TILES)
    return rescaled, inverses
