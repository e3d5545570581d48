"""Readings of gradients by :mod:`lightning_adapm.step.triton_reading`: products with bases, and sums of squares."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.step import kernels
from lightning_adapm.step.kernels import Tile
from lightning_adapm.step.launch import Matrices, aligned, launch

READ, READ_COLUMNS, COMBINE = (16, 256, 4, 3), (64, 256, 4, 3), (32, 128, 4, 3)
PROJECT, PROJECT_NEAR, PROJECT_HALF, PROJECT_FAR = (64, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 3, 128), (128, 32, 8, 4)
PROJECT_FURTHER = (128, 64, 8, 3)
"""Rows and columns of a tile, warps, stages, and registers of a thread where they are bounded: of sums over rows, and
over columns as well; of a combination; of sums with products, on smaller GPUs, and on those with large blocks up to 128
ranks in a tile, of gradients in two bytes as well, up to 256, and above. The fastest of some on an H200, the
second-last on an H100, and within the 99 KiB of shared memory that a block has on smaller GPUs.
"""
PROGRAMS, PROGRAMS_FURTHER = 256, 128
"""Fewest tiles of PROJECT_HALF, and of PROJECT_FURTHER, that occupy a device. A program reads a whole basis, which
takes as long as its rows of gradients in two bytes, so it has more of these where there are enough; left factors have
too few columns.
"""
SUM_COLUMNS, SUM_SQUARES, SUMMED_ROWS = (16, 512, 4, 3), (4, 2048, 4, 3), 512
"""Tiles, and the rows that a program adds up, of sums over columns of gradients in two bytes, and over rows as well.

Programs that add up rows of some columns take half of the time of programs that add up all columns of some rows. Where
products are taken of gradients, these are read once more.
"""
READ_EXACTLY, COMBINE_EXACTLY = (64, 32, 4, 3), (32, 128, 8, 3)
"""Tiles of sums with products, and of a combination, in float32's precision: operands are twice as large. The former is
the fastest of some on an H200.
"""

ROWS_OF_A_TILE = 64
"""Fewest rows of a tile with sums over columns."""

RANKS, MOST_RANKS = 128, 256
"""Most ranks in a tile, which a program has in its registers; of sums with products, on GPUs with large blocks."""
MORE_RANKS, MOST_MORE_RANKS = 32, 64
"""Ranks behind these in a program, in a block of their own, where both together save readings of the gradients."""

FEW_ROWS, FEW_RANKS, PROJECT_FEW = 256, 64, (64, 64, 4, 3)
"""Matrices of at most so many rows, as bases are, occupy a device only in tiles of few ranks."""

_ROWS_OF_A_PRODUCT = 256, 2048
"""Products from the left are taken of so many rows each, fewer where there are few columns: enough programs for a
device, also where a table of tokens is the only matrix of its shape. Tiles of rows divide them.
"""


class Arithmetic(NamedTuple):
    """How products with gradients are computed."""

    exact: bool = False
    """With operands in float32, but for the last bits, instead of :data:`~lightning_adapm.step.kernels.FACTOR`."""
    absolute: bool = False
    """With the absolute values of the gradients."""


FAST = Arithmetic()
"""Arithmetic of low-rank momentum."""


class Reading(NamedTuple):
    """Results of one pass over ``b`` gradients."""

    squares: Tensor
    """Sums of squares of rows, ``(b, m)``."""
    flaws: Tensor
    """Flaws ``(gradients,)``, int32, not 0 where a gradient has an entry that is not finite."""
    columns: Tensor | None
    """Sums of squares of columns, ``(b, n)``, finite or not, if they were asked for."""


def read(
    grads: Matrices,
    gradients: int,
    bases: Matrices | None,
    r: int,
    known: Reading | None,
    columns: bool = False,
    arithmetic: Arithmetic = FAST,
) -> tuple[Tensor | None, Reading]:
    """Read gradients once, for their products with bases and for their sums of squares.

    Args:
        grads: ``b`` matrices ``(m, n)`` of gradients.
        gradients: Number of gradients, each of which consists of equally many of these matrices.
        bases: Matrices ``(r, n)``, float32 for exact products; None for no products.
        r: Number of rows of the bases.
        known: Sums of squares and flaws of the gradients, if an earlier pass has found them.
        columns: Whether sums of squares of columns are found, too, unless an earlier pass has.
        arithmetic: How products are computed.

    Returns:
        Products with the transposed bases, ``(b, m, padded(r))`` in float32, if there are bases; and the reading.
    """
    like, b = grads.like, len(grads.addresses)
    (m, n), width = grads.shape, kernels.padded(r)
    columns = columns and known is None
    if bases is None and columns and _are_summed_apart(grads):
        return None, _sums_of_squares(grads, gradients)
    apart = columns and bases is not None and like.element_size() == 2 and not arithmetic.exact
    together = columns and not apart
    if arithmetic.exact:
        tile, block_r, more_r = Tile(*READ_EXACTLY).narrowed(n), _ranks(r, RANKS), 0
    else:
        tile, block_r, more_r = _tile_of_sums(together, n) if bases is None else _tile_of_products(grads, r, together)
    high, _, _ = tile.grid(m, n, b)
    projected = None if bases is None else like.new_empty((b, m, width), dtype=torch.float32)
    sums = like.new_empty((b, high, n), dtype=torch.float32) if together else None
    found = known or Reading(
        like.new_empty((b, m), dtype=torch.float32), like.new_zeros(gradients, dtype=torch.int32), None
    )
    launch(
        "read",
        (high * max(1, -(-width // (block_r + more_r))), b, 1),
        (grads, bases, projected, found.squares, found.flaws, sums),
        (m, n, r, width, grads.stride, b // gradients),
        (1.0,),
        GRAD=grads.dtype,
        BASIS=(bases or grads).dtype,
        FACTOR=kernels.FACTOR,
        ALIGNED=aligned(grads, bases),
        FIRST=known is None,
        COLUMNS=together,
        PROJECT=bases is not None,
        SPLIT=arithmetic.exact,
        ABSOLUTE=arithmetic.absolute,
        BLOCK_R=block_r,
        MORE_R=more_r,
        **tile.constants,
    )
    if apart:
        sums = _summed(grads, SUM_COLUMNS, None)
    return projected, found if sums is None else found._replace(columns=sums.sum(dim=1))


def _are_summed_apart(grads: Matrices) -> bool:
    """Whether sums over columns and rows have programs for some columns each, and these are enough for a device."""
    programs = len(grads.addresses) * -(-grads.shape[0] // SUMMED_ROWS)
    return grads.like.element_size() == 2 and programs >= PROGRAMS // 2


def _sums_of_squares(grads: Matrices, gradients: int) -> Reading:
    """Results of a reading without products, with sums over columns."""
    (m, n), b, like = grads.shape, len(grads.addresses), grads.like
    tiles = -(-n // Tile(*SUM_SQUARES).narrowed(n).columns)
    squares = like.new_empty((tiles, b, m), dtype=torch.float32)
    flaws = like.new_zeros(gradients, dtype=torch.int32)
    sums = _summed(grads, SUM_SQUARES, (squares, flaws))
    return Reading(squares[0] if tiles == 1 else squares.sum(dim=0), flaws, sums.sum(dim=1))


def _summed(grads: Matrices, tile: tuple[int, ...], first: tuple[Tensor, Tensor] | None) -> Tensor:
    """Sums of squares of columns ``(b, parts, n)``, over :data:`SUMMED_ROWS` each.

    Of a ``first`` reading, sums over rows and flaws are written into these two tensors.
    """
    (m, n), b = grads.shape, len(grads.addresses)
    own, parts = Tile(*tile).narrowed(n), -(-m // SUMMED_ROWS)
    sums = grads.like.new_empty((b, parts, n), dtype=torch.float32)
    squares, flaws = first or (None, None)
    launch(
        "sum_squares",
        (-(-n // own.columns), b, parts),
        (grads, squares, sums, flaws),
        (m, n, grads.stride, SUMMED_ROWS, 1 if flaws is None else b // len(flaws)),
        (),
        GRAD=grads.dtype,
        ALIGNED=grads.aligned,
        FIRST=first is not None,
        STAGES=own.stages,
        **own.constants,
    )
    return sums


def _tile_of_sums(columns: bool, n: int) -> tuple[Tile, int, int]:
    """Tile of a reading without products, and the fewest ranks."""
    return Tile(*(READ_COLUMNS if columns else READ)).narrowed(n), 16, 0


def multiplied(matrices: Matrices, others: Tensor, known: Reading) -> Tensor:
    """Products of ``matrices`` ``(m, n)`` with transposed ``others`` ``(b, r, n)``, ``(b, m, padded(r))``."""
    factors = Matrices.of([_factor(others)])
    product, _ = read(matrices, len(known.flaws), factors, others.shape[-2], known)
    assert product is not None
    return product


def _tile_of_products(grads: Matrices, r: int, columns: bool) -> tuple[Tile, int, int]:
    """Tile of a reading with products with ``r`` rows, and the numbers of ranks in its two blocks."""
    (m, n), like = grads.shape, grads.like
    if not columns and m <= FEW_ROWS:
        return Tile(*PROJECT_FEW).narrowed(n), _ranks(r, FEW_RANKS), 0
    if not kernels.has_large_blocks(like.device):
        return Tile(*PROJECT).narrowed(n), _ranks(r, RANKS), 0
    ranks, rows = _ranks(r, MOST_RANKS), m * len(grads.addresses)
    if ranks > RANKS:
        large = not columns and kernels.has_largest_blocks(like.device)
        return _tile_of_many_ranks(kernels.padded(r), n, rows, columns, large)
    half = like.element_size() == 2 and rows >= PROGRAMS * PROJECT_HALF[0] and n > MOST_RANKS
    return Tile(*(PROJECT_HALF if half else PROJECT_NEAR)).narrowed(n), ranks, 0


def _tile_of_many_ranks(width: int, n: int, rows: int, columns: bool, large: bool) -> tuple[Tile, int, int]:
    """:func:`_tile_of_products` of more than :data:`RANKS`, in few readings of the gradients; the ``large`` one where a
    block has the memory.
    """
    near, far = RANKS + MORE_RANKS, MOST_RANKS + MOST_MORE_RANKS
    if large and rows >= PROGRAMS_FURTHER * PROJECT_FURTHER[0] and -(-width // far) < -(-width // MOST_RANKS):
        return Tile(*PROJECT_FURTHER).narrowed(n), MOST_RANKS, MOST_MORE_RANKS
    if not columns and -(-width // near) <= -(-width // MOST_RANKS):  # of smaller tiles there are more
        return Tile(*PROJECT_NEAR).narrowed(n), RANKS, MORE_RANKS
    return Tile(*PROJECT_FAR).narrowed(n), MOST_RANKS, 0


def combine(grads: Matrices, weights: Tensor, flaws: Tensor | None = None, arithmetic: Arithmetic = FAST) -> Tensor:
    """Multiply transposed ``weights`` ``(b, m, r)`` by ``b`` gradients ``(m, n)``, to ``(b, r, n)`` in float32.

    Gradients with a flaw count as zero. For exact products the weights are in float32.
    """
    b, m, r = weights.shape
    n = grads.shape[1]
    rows = rows_of_a_product(n)
    parts = -(-m // rows)
    product = weights.new_empty((b, parts, r, n), dtype=torch.float32)
    tile, block_r = Tile(*(COMBINE_EXACTLY if arithmetic.exact else COMBINE)).narrowed(n), _ranks(r, RANKS)
    launch(
        "combine",
        (-(-n // tile.columns) * -(-r // block_r), b, parts),
        # weights: read by every block of columns
        (grads, weights.contiguous() if arithmetic.exact else _factor(weights), flaws, product),
        (m, n, r, grads.stride, 1 if flaws is None else b // len(flaws), rows),
        (),
        GRAD=grads.dtype,
        FACTOR=kernels.FACTOR,
        ALIGNED=grads.aligned,
        CHECKED=flaws is not None,
        SPLIT=arithmetic.exact,
        ABSOLUTE=arithmetic.absolute,
        BLOCK_R=block_r,
        **tile.constants,
    )
    return product.squeeze(1) if parts == 1 else product.sum(dim=1)


def _factor(tensor: Tensor) -> Tensor:
    """A factor of a product in its dtype, row by row, by one copy at most."""
    return tensor.to(kernels.FACTOR, memory_format=torch.contiguous_format).contiguous()


def _ranks(r: int, most: int) -> int:
    """Ranks in a tile: a power of two."""
    return min(most, max(16, kernels.power_of_two(r)))


def rows_of_a_product(n: int) -> int:
    """Rows that are combined at a time, of matrices with ``n`` columns."""
    least, most = _ROWS_OF_A_PRODUCT
    return min(most, max(least, kernels.power_of_two(n)))
