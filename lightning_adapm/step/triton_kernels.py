"""Triton kernels of a step on CUDA: advance what is kept of rows and columns, and move parameters; and all others.

Every launch works on ``b`` matrices of one shape that lie anywhere: their addresses are tables on the device, int64.
Arithmetic is float32 whatever is stored; products round their operands to ``FACTOR`` and add up in float32. What makes
a basis orthonormal is not here. ``flaws`` ``(b / each,)``, int32, is not zero where a gradient, of ``each`` matrices,
has an entry that is not finite. ``TRITON_INTERPRET=1`` runs them on a CPU.
"""

import triton
import triton.language as tl

from lightning_adapm.step import triton_rounding
from lightning_adapm.step.triton_orthogonal import direct as direct
from lightning_adapm.step.triton_orthogonal import rescale as rescale
from lightning_adapm.step.triton_orthogonal import symmetric as symmetric
from lightning_adapm.step.triton_reading import columns as columns
from lightning_adapm.step.triton_reading import combine as combine
from lightning_adapm.step.triton_reading import read as read


@triton.jit
def advance(
    projected,
    squares,
    flaws,
    lefts,
    averages,
    held,
    moved,
    factors,
    roots,
    clock,
    m,
    r,
    projected_width,
    width,
    span,
    each,
    count,
    largest,
    beta1,
    beta2,
    correction,
    flush,
    LEFT: tl.constexpr,
    FACTOR: tl.constexpr,
    LOW_RANK: tl.constexpr,
    REFRESHED: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARED: tl.constexpr,
    CLOCKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Take what :func:`read` found into the low-rank momentum and the second moments of blocks of rows.

    Where ``LOW_RANK``, ``lefts`` ``(m, r)`` become ``beta1 left + (1 - beta1) projected``, with ``projected``
    ``(b, m, projected_width)``, and ``factors`` ``(b, m, width)`` ``left / correction - projected``, zero behind ``r``.
    Where a basis was ``REFRESHED``, ``moved`` ``(b, m, r)`` are in the place of the lefts that there were, ``held``,
    and the factors are ``[left / correction - projected - flush moved, flush held]``.
    Where ``BLOCKS``, ``averages`` become ``beta2 average + (1 - beta2) mean`` with the means of squares of each row or
    (``SHARED``) of every ``span`` rows, of ``count`` entries each and not above ``largest``; ``roots`` ``(b, m)`` are
    their roots. ``SHARED`` spans may be larger than ``BLOCK_M`` where nothing is ``LOW_RANK``. Where ``CLOCKED``, the
    correction is read from the :class:`~lightning_adapm.step.clock.Clock` at ``clock``.
    """
    if CLOCKED:
        correction = tl.load(clock + 2)
    inside = tl.arange(0, BLOCK_M)
    row = tl.program_id(0) * span + inside
    which = tl.program_id(1).to(tl.int64)
    mine = (inside < span) & (row < m)
    counts = tl.load(flaws + which // each) == 0
    if BLOCKS:
        average = tl.load(averages + which).to(tl.pointer_type(tl.float32))
        if SHARED:
            square = tl.zeros((BLOCK_M,), tl.float32)
            for start in range(0, span, BLOCK_M):
                own = (start + inside < span) & (start + row < m)
                square += tl.where(counts, tl.load(squares + which * m + start + row, own, 0.0), 0.0)
            mean = tl.minimum(tl.sum(square, 0) / count, largest)
            value = beta2 * tl.load(average + tl.program_id(0)) + (1 - beta2) * mean
            tl.store(average + tl.program_id(0), value)
            root = tl.sqrt(value + tl.zeros_like(square))
            for start in range(0, span, BLOCK_M):
                tl.store(roots + which * m + start + row, root, (start + inside < span) & (start + row < m))
        else:
            square = tl.where(counts, tl.load(squares + which * m + row, mine, 0.0), 0.0)
            value = beta2 * tl.load(average + row, mine, 0.0) + (1 - beta2) * tl.minimum(square / count, largest)
            tl.store(average + row, value, mine)
            tl.store(roots + which * m + row, tl.sqrt(value), mine)
    if LOW_RANK:
        left = tl.load(lefts + which).to(tl.pointer_type(LEFT))
        line = which * m + row.to(tl.int64)[:, None]
        for start in range(0, width, BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)[None, :]
            own = mine[:, None] & (rank < r)
            p = tl.where(counts, tl.load(projected + line * projected_width + rank, own, 0.0), 0.0)
            at = left + row.to(tl.int64)[:, None] * r + rank
            before = tl.load(moved + line * r + rank, own, 0.0) if REFRESHED else tl.load(at, own, 0.0).to(tl.float32)
            kept = before + (1 - beta1) * (p - before)
            factor = kept / correction - p
            if tl.float16 == LEFT:  # an infinity would stay forever
                kept = tl.minimum(tl.maximum(kept, -65504.0), 65504.0)
            tl.store(at, kept.to(LEFT), own)
            if REFRESHED:
                old = tl.load(held + line * r + rank - r, mine[:, None] & (rank >= r) & (rank < 2 * r), 0.0)
                factor += flush * (old - before)
            tl.store(factors + line * width + rank, factor.to(FACTOR), mine[:, None] & (rank < width))


@triton.jit
def factor(
    squares,
    sums,
    flaws,
    row_averages,
    column_averages,
    shares,
    m,
    n,
    each,
    rows,
    columns,
    largest,
    tiny,
    beta2,
    extra,
    BLOCK: tl.constexpr,
):
    """Take sums of squares of rows, ``squares`` ``(b, m)``, and of columns, ``sums`` ``(b, n)``, into averages of their
    means, each not above ``largest``, plus ``extra``; ``rows`` is ``m`` and ``columns`` ``n`` in floating point.

    ``shares`` ``(b, m)`` are the roots of the averages of rows over their mean, and the roots of those of columns
    overwrite the sums.
    """
    which = tl.program_id(0).to(tl.int64)
    counts = tl.load(flaws + which // each) == 0
    averages = tl.load(row_averages + which).to(tl.pointer_type(tl.float32))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, m, BLOCK):
        row = start + tl.arange(0, BLOCK)
        mean = tl.where(counts, tl.load(squares + which * m + row, row < m, 0.0), 0.0) / columns
        mean = tl.minimum(mean, largest) + extra
        value = beta2 * tl.load(averages + row, row < m, 0.0) + (1 - beta2) * mean
        tl.store(averages + row, value, row < m)
        total += tl.where(row < m, value, 0.0)
    whole = tl.maximum(tl.sum(total, 0) / rows, tiny)
    for start in range(0, m, BLOCK):
        row = start + tl.arange(0, BLOCK)
        value = tl.load(averages + row, row < m, 0.0)
        tl.store(shares + which * m + row, tl.sqrt(value / whole), row < m)
    averages = tl.load(column_averages + which).to(tl.pointer_type(tl.float32))
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = sums + which * n + column
        mean = tl.where(counts, tl.load(at, column < n, 0.0), 0.0) / rows
        mean = tl.minimum(mean, largest) + extra
        value = beta2 * tl.load(averages + column, column < n, 0.0) + (1 - beta2) * mean
        tl.store(averages + column, value, column < n)
        tl.store(at, tl.sqrt(value), column < n)


@triton.jit
def relate(
    grads,
    shares,
    roots,
    flaws,
    sums,
    m,
    n,
    stride,
    each,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``sums`` ``(b, tiles)``: sums of squares of matrices over the products of ``shares`` ``(b, m)`` and ``roots``
    ``(b, n)``, zero those with a flaw.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(2).to(tl.int64)
    grad = tl.load(grads + which).to(tl.pointer_type(GRAD))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    at = grad + row.to(tl.int64)[:, None] * stride + column[None, :]
    g = tl.load(at, (row[:, None] < m) & (column[None, :] < n), 0.0).to(tl.float32)
    g = tl.where(tl.load(flaws + which // each) == 0, g, 0.0)
    share = tl.load(shares + which * m + row, row < m, 1.0)
    root = tl.load(roots + which * n + column, column < n, 1.0)
    ratio = g / (share[:, None] * root[None, :])
    place = (which * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + place, tl.sum(tl.sum(ratio * ratio, 1), 0))


@triton.jit
def move(
    parameters,
    directions,
    roots,
    flaws,
    averages,
    left,
    rights,
    root_columns,
    streams,
    scales,
    rates,
    clock,
    m,
    n,
    k,
    width,
    group_rows,
    group_stride,
    parameter_stride,
    direction_stride,
    root_stride_m,
    root_stride_n,
    each,
    beta1,
    scale,
    correction,
    eps,
    beta2,
    lr,
    decay,
    clip,
    step,
    PARAMETER: tl.constexpr,
    DIRECTION: tl.constexpr,
    AVERAGE: tl.constexpr,
    RIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHECKED: tl.constexpr,
    DENSE: tl.constexpr,
    FACTORED: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    AVERAGED: tl.constexpr,
    SPAN: tl.constexpr,
    CLAMP: tl.constexpr,
    FACTORS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    RATED: tl.constexpr,
    CLOCKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``p = (1 - lr decay) p - lr clamp(scale (direction + left right) / (root / correction + eps))``.

    ``parameters`` and ``directions`` are ``(m, n)``; with ``FACTORS``, ``left`` is ``(b, m, width)``, zero behind
    ``k``, and ``rights`` are ``(k, n)``. Rows of a parameter come in groups of ``group_rows``, ``group_stride`` apart.
    Roots are ``DENSE``, ``(b, m)``, where ``FACTORED`` times the ``root_columns`` ``(b, n)``, or at addresses with the
    strides given, 0 where they broadcast; where ``ELEMENTWISE``, these are averages of the squared direction, which
    they take first. Where ``CHECKED``, a direction with a flaw is zero. Where ``AVERAGED``, ``averages`` ``(m, n)``
    take the direction and stand in its place. With a ``SPAN`` they are codes of
    :mod:`lightning_adapm.moments.quantized` with ``scales`` of so many columns each. Where ``STOCHASTIC``, parameters
    are rounded by the bits of ``streams`` ``(b, 3)`` in this ``step``. Where ``RATED``, ``lr`` is multiplied by the
    matrix's own of ``rates`` ``(b,)``. Where ``CLOCKED``, what changes from step to step is read from the
    :class:`~lightning_adapm.step.clock.Clock` at ``clock``.
    """
    if CLOCKED:
        lr = tl.load(clock)
        step = tl.load(clock + 1)
        scale = tl.load(clock + 3)
        correction = tl.load(clock + 4)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(2).to(tl.int64)
    inside = (row[:, None] < m) & (column[None, :] < n)
    wide = row.to(tl.int64)[:, None]
    direction = tl.load(directions + which).to(tl.pointer_type(DIRECTION))
    if ALIGNED:
        direction = tl.multiple_of(direction, 16)
    d = tl.load(direction + wide * direction_stride + column[None, :], inside, 0.0).to(tl.float32)
    if FACTORS:  # before the parameter is loaded: registers are short in the loop
        right = tl.load(rights + which).to(tl.pointer_type(RIGHT))
        if ALIGNED:
            right = tl.multiple_of(right, 16)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, width, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            own = left + which * m * width + wide * width + inner[None, :]
            a = tl.load(own, (row[:, None] < m) & (inner[None, :] < width), 0.0)
            other = right + inner[:, None] * n + column[None, :]
            b = tl.load(other, (inner[:, None] < k) & (column[None, :] < n), 0.0).to(FACTOR)
            product = tl.dot(a, b, product)
    parameter = tl.load(parameters + which).to(tl.pointer_type(PARAMETER))
    if ALIGNED:
        parameter = tl.multiple_of(parameter, 16)
    parameter += wide // group_rows * group_stride + wide % group_rows * parameter_stride + column[None, :]
    p = tl.load(parameter, inside, 0.0).to(tl.float32)
    if CHECKED:
        d = tl.where(tl.load(flaws + which // each) == 0, d, 0.0)
    if DENSE:
        root = tl.load(roots + which * m + row, row < m, 0.0)[:, None]
        if FACTORED:
            root = root * tl.load(root_columns + which * n + column, column < n, 0.0)[None, :]
    else:
        at = tl.load(roots + which).to(tl.pointer_type(tl.float32))
        if ALIGNED and ELEMENTWISE:
            at = tl.multiple_of(at, 16)
        at += wide * root_stride_m + column[None, :] * root_stride_n
        root = tl.load(at, inside, 0.0)
        if ELEMENTWISE:
            root = beta2 * root + (1 - beta2) * d * d
            tl.store(at, root, inside)
            root = tl.sqrt(root)
    if AVERAGED:
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
            block = tl.program_id(1) * (BLOCK_N // SPAN) + tl.arange(0, BLOCK_N // SPAN)[None, :]
            largest = tl.where(largest < 1.1754944e-38, 0.0, largest)
            tl.store(scale_of + block, largest, (row[:, None] < m) & (block < tl.cdiv(n, SPAN)))
        else:
            kept = tl.minimum(tl.maximum(d, -65504.0), 65504.0) if tl.float16 == AVERAGE else d
            tl.store(average, kept.to(AVERAGE), inside)
    if FACTORS:
        d += product
    if RATED:
        lr *= tl.load(rates + which)
    update = scale * d / (root / correction + eps)
    if CLAMP:
        update = tl.minimum(tl.maximum(update, -clip), clip)
    p = p * (1 - lr * decay) - lr * update
    if STOCHASTIC:
        random = triton_rounding.bits(streams + 3 * which, wide, column[None, :], n, step)
        p = triton_rounding.rounded(p, random, PARAMETER)
    tl.store(parameter, p.to(PARAMETER), inside)
