"""Triton kernels of directions in the dtype of products, and of their norms.

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
    factors,
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
    RESULT: tl.constexpr,
    ALIGNED: tl.constexpr,
    AVERAGED: tl.constexpr,
    SPAN: tl.constexpr,
    FACTORS: tl.constexpr,
    SCALED: tl.constexpr,
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

    Where ``SCALED``, matrices are multiplied by ``factors`` ``(b,)``, with which nothing overflows, those with a factor
    of 0 are zero, and ``sizes`` ``(b, tiles)`` are sums of squares.
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
    tiles = tl.num_programs(0)
    at = found + which * m * n + wide * n + column[None, :]
    if SCALED:
        factor = tl.load(factors + which)
        d = tl.where(factor > 0.0, d * factor, 0.0)
        tl.store(sizes + which * tiles + tl.program_id(0), tl.sum(tl.sum(d * d, 1), 0))
    else:
        finite = tl.abs(d) < float("inf")
        size = tl.where(inside & finite, tl.abs(d), 0.0)
        largest = tl.max(tl.max(size, 1), 0)
        part = size / tl.maximum(largest, 1.1754944e-38)
        square = tl.sum(tl.sum(part * part, 1), 0)
        broken = tl.max(tl.max((inside & (finite == 0)).to(tl.int32), 1), 0)
        first = sizes + which * 2 * tiles + tl.program_id(0)
        tl.store(first, tl.where(broken == 0, largest, float("inf")))
        tl.store(first + tiles, square)
        d = tl.where(finite, d, 0.0)
    tl.store(at, d.to(RESULT), inside)


@triton.jit
def bound(
    grads,
    squares,
    left,
    lengths,
    flaws,
    sizes,
    m,
    n,
    width,
    stride,
    each,
    rows,
    low,
    high,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    FACTORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bounds of what ``rows`` at a time have of the squared norms of ``grads`` ``(m, n)`` and of ``left``
    ``(b, m, width)`` together, as ``sizes`` ``(b, 2, parts)``: a largest entry, and a number of squares of it.

    Sums of squares of rows are ``squares`` and ``lengths`` ``(b, m)``. Where their sum is not between ``low`` and
    ``high``, because it may have over- or underflown, entries are read.
    """
    which = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * rows
    last = min(first + rows, m)
    counts = tl.load(flaws + which // each) == 0
    inner = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):
        row = start + inner
        total += tl.where(counts, tl.load(squares + which * m + row, row < last, 0.0), 0.0)
        if FACTORS:
            total += tl.load(lengths + which * m + row, row < last, 0.0)
    square = tl.sum(total, 0)
    largest, number = tl.sqrt(square), tl.full((), 1.0, tl.float32)
    ordinary = (square > low) & (square < high)
    if ordinary == 0:
        most = tl.zeros((BLOCK,), tl.float32)
        grad = tl.load(grads + which).to(tl.pointer_type(GRAD))
        if ALIGNED:
            grad = tl.multiple_of(grad, 16)
        grad += first.to(tl.int64) * stride
        left += (which * m + first) * width
        for _ in range(first, last):
            for start in range(0, n, BLOCK):
                column = start + inner
                value = tl.abs(tl.load(grad + column, column < n, 0.0).to(tl.float32))
                most = tl.maximum(most, tl.where(counts, value, 0.0))
            grad += stride
            if FACTORS:
                for start in range(0, width, BLOCK):
                    column = start + inner
                    value = tl.abs(tl.load(left + column, column < width, 0.0).to(tl.float32))
                    most = tl.maximum(most, tl.where(value < float("inf"), value, float("inf")))
                left += width
        largest = tl.max(most, 0)
        number = number * rows * (n + width)
    at = sizes + which * 2 * tl.num_programs(0) + tl.program_id(0)
    tl.store(at, largest)
    tl.store(at + tl.num_programs(0), number)


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
