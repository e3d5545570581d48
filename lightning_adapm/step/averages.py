"""Averages that :mod:`lightning_adapm.step.triton_averages` takes readings of gradients into."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.second import largest
from lightning_adapm.step import kernels
from lightning_adapm.step.kernels import Tile
from lightning_adapm.step.launch import Matrices, launch
from lightning_adapm.step.moves import MOVE
from lightning_adapm.step.reading import Reading

_LARGEST, _TINY = largest(torch.float32), torch.finfo(torch.float32).tiny

MOST_ROWS_OF_A_HEAD, ADVANCED_NUMEL = 256, 4096
"""Rows that share one second moment are a single tile of :func:`advance` up to so many, with the columns that registers
hold.
"""

FACTORED = 4096
"""Rows, or columns, that a program takes into factors at once: it takes all of a matrix."""

WEIGH = (64, 64)
"""Rows and columns of a tile of weights."""


class Refreshed(NamedTuple):
    """Left factors at a refresh."""

    moved: Tensor
    """Left factors in the new basis, ``(b, m, padded(r))`` in float32."""
    flush: float
    """Factor of the difference to those in the old basis, which is applied at once."""


def advance(
    reading: Reading,
    projected: Tensor | None,
    lefts: Matrices | None,
    refreshed: Refreshed | None,
    averages: Matrices | None,
    shape: torch.Size,
    blocks: int | None,
    betas: tuple[float, float],
    correction: float,
    clock: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Take a reading of gradients of ``shape`` ``(m, n)`` into low-rank momenta, if there are ``lefts``, and into block
    second moments, if there are ``averages``, of each row or of ``blocks``. ``correction`` is Adam's of the momentum,
    which a ``clock`` on the device has, too. The sums of squares of the first result's rows are written to ``lengths``
    ``(b, m)``, if there are any.

    Returns:
        What times the basis is to be added to the gradients, ``(b, m, width)``, or, where it was ``refreshed``, times
        the new basis and the one before it; and roots of the second moments by row, ``(b, m)``.
    """
    squares, flaws, _ = reading
    b, (m, n) = len(squares), shape
    r = 0 if lefts is None else lefts.like.shape[-1]
    width = kernels.padded(r if refreshed is None else 2 * r)
    span = 16 if blocks is None else m // blocks
    if lefts is not None and averages is not None and span > MOST_ROWS_OF_A_HEAD:  # each in tiles of its own
        factors, _ = advance(reading, projected, lefts, refreshed, None, shape, None, betas, correction, clock, lengths)
        _, roots = advance(reading, None, None, None, averages, shape, blocks, betas, correction, clock)
        return factors, roots
    moved, flush = refreshed or (None, 0.0)
    factors = None if projected is None else squares.new_empty((b, m, width), dtype=kernels.FACTOR)
    roots = None if averages is None else torch.empty_like(squares)
    launch(
        "advance",
        (-(-m // span), b, 1),
        (projected, squares, flaws, lefts, averages, moved, factors, lengths, roots, clock),
        (m, r, 0 if projected is None else projected.shape[-1], width, span, b // len(flaws)),
        (n if blocks is None else n * span, _LARGEST, *betas, correction, flush),
        LEFT=(squares if lefts is None else lefts).dtype,
        FACTOR=kernels.FACTOR,
        LOW_RANK=lefts is not None,
        REFRESHED=refreshed is not None,
        MEASURED=lengths is not None,
        BLOCKS=averages is not None,
        SHARED=blocks is not None,
        CLOCKED=clock is not None,
        BLOCK_M=min(kernels.power_of_two(span), 1024),
        BLOCK_R=max(16, min(64, ADVANCED_NUMEL // kernels.power_of_two(span), kernels.power_of_two(width))),
    )
    return factors, roots


def squares_of_weights(projected: Tensor, lefts: Matrices, flaws: Tensor, beta1: float) -> Tensor:
    """Sums of squares ``(b, r)`` of the columns of ``beta1 left + (1 - beta1) projected``, in float64."""
    b, m, _ = projected.shape
    squares = projected.new_empty((b, -(-m // WEIGH[0]), lefts.like.shape[-1]), dtype=torch.float64)
    _weigh(projected, lefts, flaws, beta1, None, squares, None)
    return squares.sum(dim=1)


def weigh(projected: Tensor, lefts: Matrices, flaws: Tensor, beta1: float, lengths: Tensor) -> Tensor:
    """``beta1 left + (1 - beta1) projected``, ``(b, m, r)``, with columns of unit length, in the dtype of products.

    ``lengths`` are :func:`squares_of_weights`, over all processes.
    """
    weights = projected.new_empty((*projected.shape[:2], lefts.like.shape[-1]), dtype=kernels.FACTOR)
    _weigh(projected, lefts, flaws, beta1, lengths, None, weights)
    return weights


def _weigh(
    projected: Tensor,
    lefts: Matrices,
    flaws: Tensor,
    beta1: float,
    lengths: Tensor | None,
    squares: Tensor | None,
    weights: Tensor | None,
) -> None:
    b, m, width = projected.shape
    r = lefts.like.shape[-1]
    launch(
        "weigh",
        (-(-m // WEIGH[0]), b, -(-r // WEIGH[1])),
        (projected, lefts, flaws, lengths, squares, weights),
        (m, r, width, b // len(flaws)),
        (beta1, _TINY),
        LEFT=lefts.dtype,
        FACTOR=kernels.FACTOR,
        SCALED=lengths is not None,
        BLOCK_M=WEIGH[0],
        BLOCK_R=WEIGH[1],
    )


def factor(
    reading: Reading,
    sums: Tensor,
    averages: tuple[Matrices | None, Matrices],
    shape: torch.Size,
    height: int,
    beta2: float,
    extra: float = 0.0,
    clock: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Take a reading of gradients of ``shape`` ``(m, n)`` and their ``sums`` over columns, which are overwritten, into
    ``averages`` of means of squares, plus ``extra``, over rows ``(m, 1)`` and columns ``(1, n)``. The sums are of
    columns of ``height`` rows, of which other processes may hold some. Vectors have averages of columns alone, which
    are elementwise. A ``clock`` on the device replaces ``beta2``.

    Returns:
        Factors of the roots of the second moments: of the averages of rows over their mean ``(b, m)``, which are 1 for
        vectors, and ``(b, n)``.
    """
    squares, flaws, _ = reading
    (m, n), (rows, columns) = shape, averages
    shares = torch.ones_like(squares) if rows is None else torch.empty_like(squares)
    launch(
        "factor",
        (len(squares), 1, 1),
        (squares, sums, flaws, rows, columns, shares, clock),
        (m, n, len(squares) // len(flaws)),
        (height, n, _LARGEST, _TINY, beta2, extra),
        ROWS=rows is not None,
        CLOCKED=clock is not None,
        BLOCK=FACTORED,
        num_warps=8,
    )
    return shares, sums


def relate(grads: Matrices, shares: Tensor, roots: Tensor, flaws: Tensor) -> Tensor:
    """Sums of squares ``(b,)`` of gradients over the products of ``shares`` ``(b, m)`` and ``roots`` ``(b, n)``."""
    b, (m, n) = len(grads.addresses), grads.shape
    tile = Tile(*MOVE).narrowed(n)
    grid = tile.grid(m, n, b)
    sums = shares.new_empty(b, grid[0] * grid[1])
    launch(
        "relate",
        grid,
        (grads, shares, roots, flaws, sums),
        (m, n, grads.stride, b // len(flaws)),
        (),
        GRAD=grads.dtype,
        ALIGNED=grads.aligned,
        **tile.constants,
    )
    return sums.sum(dim=1)
