"""Triton kernels of orthogonal updates: directions in the dtype of products, and products that are symmetric.

As in :mod:`lightning_adapm.step.triton_kernels`, gradients and state lie anywhere, at addresses in tables. What is
orthogonalized is one tensor ``(b, m, n)``.
"""

import triton
import triton.language as tl

from lightning_adapm.step import triton_momentum, triton_products


@triton.jit
def direct(
    grads,
    averages,
    scales,
    left,
    rights,
    flaws,
    found,
    sizes,
    m,
    n,
    k,
    width,
    stride,
    each,
    beta1,
    share,
    GRAD: tl.constexpr,
    AVERAGE: tl.constexpr,
    RIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    AVERAGED: tl.constexpr,
    SPAN: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``found = grad + share left right``, or ``(1 - share) grad + share average`` where ``AVERAGED``.

    ``averages`` ``(m, n)``, with a ``SPAN`` codes with ``scales``, take the gradient first:
    ``beta1 average + (1 - beta1) grad``. ``left`` is ``(b, m, width)``, zero behind ``k``, and ``rights`` are
    ``(k, n)``. ``sizes`` ``(b, 2, tiles)`` are each tile's largest entry and its sum of squares in units of that, in
    which nothing overflows. An entry that is not finite is written as zero, and makes the tile's largest entry
    infinite.
    """
    # programs that follow each other work on the same rows, as memory is read and written fastest
    across = tl.cdiv(n, BLOCK_N)
    aside = tl.program_id(0) % across
    row = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = aside * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1).to(tl.int64)
    inside = (row[:, None] < m) & (column[None, :] < n)
    wide = row.to(tl.int64)[:, None]
    grad = tl.load(grads + which).to(tl.pointer_type(GRAD))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    d = tl.load(grad + wide * stride + column[None, :], inside, 0.0).to(tl.float32)
    d = tl.where(tl.load(flaws + which // each) == 0, d, 0.0)
    if AVERAGED:
        average = triton_momentum.averaged(
            averages, scales, which, row, column, aside, m, n, d, beta1, AVERAGE, ALIGNED, SPAN, BLOCK_M, BLOCK_N
        )
        d += share * (average - d)
    if FACTORS:
        product = triton_products.low_rank(
            left, rights, which, row, column, m, n, k, width, RIGHT, FACTOR, False, ALIGNED, BLOCK_K
        )
        d += share * product
    finite = tl.abs(d) < float("inf")
    size = tl.where(inside & finite, tl.abs(d), 0.0)
    largest = tl.max(tl.max(size, 1), 0)
    part = size / tl.maximum(largest, 1.1754944e-38)
    square = tl.sum(tl.sum(part * part, 1), 0)
    broken = tl.max(tl.max((inside & (finite == 0)).to(tl.int32), 1), 0)
    tiles = tl.num_programs(0)
    at = sizes + which * 2 * tiles + tl.program_id(0)
    tl.store(at, tl.where(broken == 0, largest, float("inf")))
    tl.store(at + tiles, square)
    tl.store(found + which * m * n + wide * n + column[None, :], tl.where(finite, d, 0.0).to(FACTOR), inside)


@triton.jit
def rescale(found, result, factors, numel, FACTOR: tl.constexpr, RESULT: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply matrices ``(b, numel)`` by ``factors`` ``(b,)``; those with a factor of 1 are not touched.

    The ``result`` lies in the same memory, perhaps in another dtype.
    """
    which = tl.program_id(1).to(tl.int64)
    factor = tl.load(factors + which)
    if (factor == 1.0) & (FACTOR == RESULT):
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(found + which * numel + at, at < numel, 0.0).to(tl.float32) * factor
    tl.store(result + which * numel + at, value.to(RESULT), at < numel)


@triton.jit
def norms(sizes, squares, tiles, BLOCK: tl.constexpr):
    """``squares`` ``(b,)`` in float64: squared norms of matrices, by the ``sizes`` that :func:`direct` has written."""
    which = tl.program_id(0).to(tl.int64)
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        at = sizes + which * 2 * tiles + tile
        largest = tl.load(at, tile < tiles, 0.0).to(tl.float64)
        square += largest * largest * tl.load(at + tiles, tile < tiles, 0.0).to(tl.float64)
    tl.store(squares + which, tl.sum(square, 0))


@triton.jit
def scales(squares, rescaled, inverses, b, low, high, tiny, BLOCK: tl.constexpr):
    """Factors ``(b,)`` that give matrices a norm of 1: ``rescaled`` of the matrices themselves, and ``inverses`` of
    what is computed from them, where the norm is between ``low`` and ``high``. ``squares`` ``(b,)`` are their squared
    norms in float64. Matrices of a norm up to ``tiny``, or one that is not finite, become zero.
    """
    which = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    norm = tl.sqrt(tl.load(squares + which, which < b, 0.0))
    possible = (norm > tiny) & (norm < float("inf"))
    ordinary = (norm > low) & (norm < high)
    inverse = 1.0 / tl.where(possible, norm, 1.0)
    rescale = tl.where(possible, tl.where(ordinary, 1.0, inverse), 0.0)
    tl.store(rescaled + which, rescale.to(tl.float32), which < b)
    tl.store(inverses + which, tl.where(ordinary, inverse, 1.0).to(tl.float32), which < b)


@triton.jit
def tile_below(number, across, RATIO: tl.constexpr):
    """Row and column of a tile that reaches below the diagonal, of ``across`` columns of tiles that are ``RATIO`` times
    as wide as high.

    Column ``w`` has ``RATIO (across - w)`` of them, and together with column ``across - 1 - w`` always as many.
    """
    both = RATIO * (across + 1)
    pair = number // both
    rest = number % both
    first = RATIO * (across - pair)
    other = across - 1 - pair
    in_first = rest < first
    wide = tl.where(in_first, pair, other)
    return tl.where(in_first, RATIO * pair + rest, RATIO * other + rest - first), wide


@triton.jit
def store_both(tiles, number, high, wide, value, BLOCK: tl.constexpr):
    """Store a square tile below the diagonal and its mirror image, of one on the diagonal the lower half twice, and
    nothing of one above it.
    """
    if high > wide:
        tiles.store([number, high, wide], value.reshape(1, BLOCK, BLOCK))
        tiles.store([number, wide, high], value.T.reshape(1, BLOCK, BLOCK))
    elif high == wide:
        at = tl.arange(0, BLOCK)
        even = tl.where(at[:, None] >= at[None, :], value, value.T)
        tiles.store([number, high, wide], even.reshape(1, BLOCK, BLOCK))


@triton.jit
def store_symmetric(
    matrices,
    tiles,
    number,
    high,
    wide,
    m,
    value,
    DESCRIBED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store what a tile has below the diagonal, twice."""
    if not DESCRIBED:
        row, column = high * BLOCK_M + tl.arange(0, BLOCK_M), wide * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row[:, None] < m) & (column[None, :] < m)
        first = matrices + number.to(tl.int64) * m * m
        tl.store(first + row[:, None] * m + column[None, :], value, inside & (row[:, None] >= column[None, :]))
        tl.store(first + column[None, :] * m + row[:, None], value, inside & (row[:, None] > column[None, :]))
    elif BLOCK_N == BLOCK_M:
        store_both(tiles, number, high * BLOCK_M, wide * BLOCK_N, value, BLOCK_M)
    else:
        left_half, right_half = tl.split(value.reshape(BLOCK_M, 2, BLOCK_M).permute(0, 2, 1))
        store_both(tiles, number, high * BLOCK_M, wide * BLOCK_N, left_half, BLOCK_M)
        store_both(tiles, number, high * BLOCK_M, wide * BLOCK_N + BLOCK_M, right_half, BLOCK_M)


@triton.jit
def symmetric(
    left,
    right,
    added,
    other,
    factors,
    found,
    lost,
    left_tiles,
    right_tiles,
    added_tiles,
    found_tiles,
    lost_tiles,
    m,
    k,
    stride_m,
    stride_k,
    alpha,
    beta,
    gamma,
    diagonal,
    FACTOR: tl.constexpr,
    ADDED: tl.constexpr,
    OTHER: tl.constexpr,
    LOST: tl.constexpr,
    PRODUCT_POWER: tl.constexpr,
    ADDED_POWER: tl.constexpr,
    OTHER_POWER: tl.constexpr,
    DIAGONAL_POWER: tl.constexpr,
    DESCRIBED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``found = alpha left rightᵀ + beta added + gamma other + diagonal I``, all ``(b, m, m)``, where that is known to
    be symmetric.

    ``left`` and ``right`` are ``(b, m, k)`` with the same strides. Each term is multiplied by a power of ``factors``
    ``(b,)``. Where ``LOST``, what ``found`` loses to rounding is written, too. Of ``other``, no more than what is
    below the diagonal is read.

    Tiles above the diagonal are not computed: what is below it is written twice. That is half the work, and keeps a
    product symmetric in every bit, without which errors of the next ones grow. Where ``DESCRIBED``, the tensor memory
    accelerator reads and writes tiles; its descriptors of ``TRANSPOSED`` matrices are of ``(b, k, m)``.
    """
    RATIO: tl.constexpr = BLOCK_N // BLOCK_M
    high, wide = tile_below(tl.program_id(0), tl.cdiv(m, BLOCK_N), RATIO)
    number = tl.program_id(1)
    which = number.to(tl.int64)
    if PRODUCT_POWER + ADDED_POWER + OTHER_POWER + DIAGONAL_POWER > 0:
        factor = tl.load(factors + which)
        for _ in tl.static_range(PRODUCT_POWER):
            alpha *= factor
        for _ in tl.static_range(ADDED_POWER):
            beta *= factor
        for _ in tl.static_range(OTHER_POWER):
            gamma *= factor
        for _ in tl.static_range(DIAGONAL_POWER):
            diagonal *= factor
    row, column = high * BLOCK_M + tl.arange(0, BLOCK_M), wide * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    rows = left + which * m * k + row[:, None] * stride_m + inner[None, :] * stride_k
    columns = right + which * m * k + column[None, :] * stride_m + inner[:, None] * stride_k
    product = tl.where(row[:, None] == column[None, :], diagonal / alpha, 0.0)
    if ADDED and DESCRIBED:  # first, in registers that the product has anyway
        tile = added_tiles.load([number, high * BLOCK_M, wide * BLOCK_N]).reshape(BLOCK_M, BLOCK_N)
        product += (beta / alpha) * tile.to(tl.float32)
    for start in range(0, k, BLOCK_K):
        if DESCRIBED and TRANSPOSED:
            a = left_tiles.load([number, start, high * BLOCK_M]).reshape(BLOCK_K, BLOCK_M).T
            b = right_tiles.load([number, start, wide * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
        elif DESCRIBED:
            a = left_tiles.load([number, high * BLOCK_M, start]).reshape(BLOCK_M, BLOCK_K)
            b = right_tiles.load([number, wide * BLOCK_N, start]).reshape(BLOCK_N, BLOCK_K).T
        else:
            a = tl.load(rows, (row[:, None] < m) & (start + inner[None, :] < k), 0.0)
            b = tl.load(columns, (column[None, :] < m) & (start + inner[:, None] < k), 0.0)
            rows += BLOCK_K * stride_k
            columns += BLOCK_K * stride_k
        product = tl.dot(a, b, product)
    product *= alpha
    at = which * m * m + row[:, None] * m + column[None, :]
    inside = (row[:, None] < m) & (column[None, :] < m)
    if ADDED and not DESCRIBED:
        product += beta * tl.load(added + at, inside, 0.0).to(tl.float32)
    if OTHER:
        product += gamma * tl.load(other + at, inside, 0.0).to(tl.float32)
    value = product.to(FACTOR)
    store_symmetric(found, found_tiles, number, high, wide, m, value, DESCRIBED, BLOCK_M, BLOCK_N)
    if LOST:
        value = (product - value.to(tl.float32)).to(FACTOR)
        store_symmetric(lost, lost_tiles, number, high, wide, m, value, DESCRIBED, BLOCK_M, BLOCK_N)
