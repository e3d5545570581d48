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
    if SPAN:
        scale_of = tl.load(scales + which).to(tl.pointer_type(tl.float32)) + wide * tl.cdiv(n, SPAN)
        kept = kept / 127
        kept = kept * tl.abs(kept) * tl.load(scale_of + (column // SPAN)[None, :], inside, 0.0)
    d = kept + (1 - beta1) * (d - kept)
    # an infinity would stay forever
    if SPAN:
        d = tl.minimum(tl.maximum(d, -3.4028234e38), 3.4028234e38)
        size = tl.where(inside, tl.abs(d), 0.0).reshape(BLOCK_M, BLOCK_N // SPAN, SPAN)
        largest = tl.max(size, 2)
        share = tl.sqrt(size / tl.maximum(largest, 1.1754944e-38)[:, :, None]).reshape(BLOCK_M, BLOCK_N)
        code = tl.where(d < 0, -1.0, 1.0) * tl.floor(share * 127 + 0.5)
        tl.store(average, code.to(tl.int8), inside)
        block = aside * (BLOCK_N // SPAN) + tl.arange(0, BLOCK_N // SPAN)[None, :]
        largest = tl.where(largest < 1.1754944e-38, 0.0, largest)
        tl.store(scale_of + block, largest, (row[:, None] < m) & (block < tl.cdiv(n, SPAN)))
    else:
        kept = tl.minimum(tl.maximum(d, -65504.0), 65504.0) if tl.float16 == AVERAGE else d
        tl.store(average, kept.to(AVERAGE), inside)
    return d
