"""Triton kernel that moves parameters.

As in :mod:`lightning_adapm.step.triton_kernels`, parameters, gradients and state lie anywhere, at addresses in tables.
"""

import triton
import triton.language as tl

from lightning_adapm.step import triton_momentum, triton_products, triton_rounding


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
    GROUPED: tl.constexpr,
    CHECKED: tl.constexpr,
    DENSE: tl.constexpr,
    FACTORED: tl.constexpr,
    ELEMENTWISE: tl.constexpr,
    AVERAGED: tl.constexpr,
    SPAN: tl.constexpr,
    CLAMP: tl.constexpr,
    FACTORS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EVEN: tl.constexpr,
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
    one = tl.full((1, 1), 1.0, tl.float32)  # numbers of the host have float64's digits in the interpreter
    lr, scale, correction = one * lr, one * scale, one * correction
    # programs that follow each other work on the same rows, as memory is read and written fastest
    across = tl.cdiv(n, BLOCK_N)
    high, aside = tl.program_id(0) // across, tl.program_id(0) % across
    row = high * BLOCK_M + tl.arange(0, BLOCK_M)
    column = aside * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1).to(tl.int64)
    inside = (row[:, None] < m) & (column[None, :] < n)
    wide = row.to(tl.int64)[:, None]
    direction = tl.load(directions + which).to(tl.pointer_type(DIRECTION))
    if ALIGNED:
        direction = tl.multiple_of(direction, 16)
    d = tl.load(direction + wide * direction_stride + column[None, :], inside, 0.0).to(tl.float32)
    if FACTORS:  # before the parameter is loaded: registers are short in the loop
        product = triton_products.low_rank(
            left, rights, which, row, column, m, n, k, width, RIGHT, FACTOR, ALIGNED, BLOCK_K
        )
    parameter = tl.load(parameters + which).to(tl.pointer_type(PARAMETER))
    if ALIGNED:
        parameter = tl.multiple_of(parameter, 16)
    if GROUPED:
        parameter += (row // group_rows).to(tl.int64)[:, None] * group_stride
        parameter += (row % group_rows).to(tl.int64)[:, None] * parameter_stride + column[None, :]
    else:
        parameter += wide * parameter_stride + column[None, :]
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
        d = triton_momentum.averaged(
            averages, scales, which, row, column, aside, m, n, d, beta1, AVERAGE, ALIGNED, SPAN, BLOCK_M, BLOCK_N
        )
    if FACTORS:
        d += product
    if RATED:
        lr *= tl.load(rates + which)
    if DENSE and not FACTORED:  # one division for a row
        update = d * (lr * scale / (root / correction + eps))
    else:
        update = lr * scale * d / (root * (1 / correction) + eps)
    if CLAMP:
        update = tl.minimum(tl.maximum(update, -lr * clip), lr * clip)
    p = p * (1 - lr * decay) - update
    if STOCHASTIC:
        random = triton_rounding.bits(streams + 3 * which, wide, aside * BLOCK_N, n, step, EVEN, BLOCK_N)
        moved = triton_rounding.rounded(p, random, PARAMETER)
    else:
        moved = p.to(PARAMETER)
    tl.store(parameter, moved, inside)
