"""Triton kernels of products that are symmetric, for Newton-Schulz."""

import triton
import triton.language as tl


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
