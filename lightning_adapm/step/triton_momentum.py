"""Averages of full momentum in kernels, as they are or as codes in eight bits."""

import triton
import triton.language as tl


@triton.jit
def averaged(
    averages,
    scales,
    which,
    row,
    column,
    aside,
    m,
    n,
    d,
    beta1,
    AVERAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store a tile of ``beta1 average + (1 - beta1) d``, and return it as it was before it was rounded.

    ``averages`` are addresses of ``(m, n)``. With a ``SPAN`` they are codes of :mod:`lightning_adapm.moments.quantized`
    with ``scales`` of so many columns each. The tile is number ``aside`` of those in its rows.
    """
    inside = (row[:, None] < m) & (column[None, :] < n)
    wide = row.to(tl.int64)[:, None]
    average = tl.load(averages + which).to(tl.pointer_type(AVERAGE))
    if ALIGNED:
        average = tl.multiple_of(average, 16)
    average += wide * n + column[None, :]
    kept = tl.load(average, inside, 0).to(tl.float32)
    if SPAN:  # squares of codes are exact, and 127 * 127 times this number is 1
        block = aside * (BLOCK_N // SPAN) + tl.arange(0, BLOCK_N // SPAN)[None, :]
        known = (row[:, None] < m) & (block < tl.cdiv(n, SPAN))
        scale = tl.load(scales + which).to(tl.pointer_type(tl.float32)) + wide * tl.cdiv(n, SPAN) + block
        kept = (kept * tl.abs(kept) * 6.2000124e-05).reshape(BLOCK_M, BLOCK_N // SPAN, SPAN)
        kept = (kept * tl.load(scale, known, 0.0)[:, :, None]).reshape(BLOCK_M, BLOCK_N)
    d = kept + (1 - beta1) * (d - kept)
    # an infinity would stay forever
    if SPAN:
        d = tl.minimum(tl.maximum(d, -3.4028234e38), 3.4028234e38)
        size = tl.abs(d).reshape(BLOCK_M, BLOCK_N // SPAN, SPAN)  # zero outside
        largest = tl.max(size, 2)
        # one division for a block
        share = size * (1 / tl.maximum(largest, 1.1754944e-38))[:, :, None]
        root = (tl.sqrt(share) * 127).reshape(BLOCK_M, BLOCK_N).to(tl.uint32, bitcast=True)
        root |= d.to(tl.uint32, bitcast=True) & 0x80000000
        # in this sum, the last byte of the mantissa is the nearest code
        code = (root.to(tl.float32, bitcast=True) + 12582912.0).to(tl.int32, bitcast=True)
        tl.store(average, code.to(tl.int8), inside)
        tl.store(scale, tl.where(largest < 1.1754944e-38, 0.0, largest), known)
    else:
        kept = tl.minimum(tl.maximum(d, -65504.0), 65504.0) if tl.float16 == AVERAGE else d
        tl.store(average, kept.to(AVERAGE), inside)
    return d
