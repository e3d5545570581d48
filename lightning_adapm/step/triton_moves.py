"""Triton kernel that moves parameters.

As in :mod:`lightning_adapm.step.triton_kernels`, parameters, gradients and state lie anywhere, at addresses in tables.
"""

import triton
import triton.language as tl

from lightning_adapm.step import triton_tiles


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
    root_left,
    root_rights,
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
    FITTED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    EVEN: tl.constexpr,
    RATED: tl.constexpr,
    CLOCKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``p = (1 - lr decay) p - lr clamp(scale (direction + left right) / (root / correction + eps))``.

    ``parameters`` and ``directions`` are ``(m, n)``; with ``FACTORS``, ``left`` is ``(b, m, width)``, zero behind
    ``k``, and ``rights`` are ``(k, n)``. Rows of a parameter come in groups of ``group_rows``, ``group_stride`` apart.
    Roots are ``DENSE``, ``(b, m)``, where ``FACTORED`` times the ``root_columns`` ``(b, n)``, or at addresses with the
    strides given, 0 where they broadcast; where ``ELEMENTWISE``, these are averages of the squared direction, which
    they take first. Where ``FITTED``, they are roots of averages of the squares of ``root_left root_rights``, laid out
    as the other factors and all in float32, and of the direction's. Where ``CHECKED``, a direction with a flaw is zero.
    Where ``AVERAGED``, ``averages`` ``(m, n)`` take the direction and stand in its place. With a ``SPAN`` they are
    codes of :mod:`lightning_adapm.moments.quantized` with ``scales`` of so many columns each. Where ``STOCHASTIC``,
    parameters are rounded by the bits of ``streams`` ``(b, 3)`` in this ``step``. Where ``RATED``, ``lr`` is multiplied
    by the matrix's own of ``rates`` ``(b,)``. Where ``CLOCKED``, what changes from step to step is read from the
    :class:`~lightning_adapm.step.clock.Clock` at ``clock``.

    A program moves one tile. Where ``HELD`` is not 0, it moves so many columns, tile by tile, and loads its rows of
    ``left`` once: up to ``BLOCK_K`` of ``width``.
    """
    if CLOCKED:
        lr = tl.load(clock)
        step = tl.load(clock + 1)
        scale = tl.load(clock + 3)
        correction = tl.load(clock + 4)
    one = tl.full((1, 1), 1.0, tl.float32)  # numbers of the host have float64's digits in the interpreter
    lr, scale, correction = one * lr, one * scale, one * correction
    # programs that follow each other work on the same rows, as memory is read and written fastest
    wide = HELD if HELD else BLOCK_N
    across = tl.cdiv(n, wide)
    first = tl.program_id(0) % across * wide
    row = tl.program_id(0) // across * BLOCK_M + tl.arange(0, BLOCK_M)
    which = tl.program_id(1).to(tl.int64)
    counts = tl.load(flaws + which // each) == 0 if CHECKED else True
    root = one
    if DENSE:
        root = tl.load(roots + which * m + row, row < m, 0.0)[:, None]
    if RATED:
        lr *= tl.load(rates + which)
    # fmt: off
    if HELD:
        inner = tl.arange(0, BLOCK_K)
        at = left + which * m * width + row.to(tl.int64)[:, None] * width + inner[None, :]
        held = tl.load(at, (row[:, None] < m) & (inner[None, :] < width), 0.0)
        for start in tl.range(first, min(first + HELD, n), BLOCK_N, num_stages=STAGES):
            triton_tiles.moved(
                parameters, directions, roots, averages, left, rights, root_columns, root_left, root_rights, streams,
                scales, held, root, counts, row, start, which, m, n, k, width, group_rows, group_stride,
                parameter_stride, direction_stride, root_stride_m, root_stride_n, beta1, scale, correction, eps, beta2,
                lr, decay, clip, step, PARAMETER, DIRECTION, AVERAGE, RIGHT, FACTOR, ALIGNED, GROUPED, CHECKED, DENSE,
                FACTORED, ELEMENTWISE, AVERAGED, SPAN, CLAMP, FACTORS, FITTED, STOCHASTIC, EVEN, BLOCK_M, BLOCK_N,
                BLOCK_K, HELD
            )
    else:
        triton_tiles.moved(
            parameters, directions, roots, averages, left, rights, root_columns, root_left, root_rights, streams,
            scales, one, root, counts, row, first, which, m, n, k, width, group_rows, group_stride, parameter_stride,
            direction_stride, root_stride_m, root_stride_n, beta1, scale, correction, eps, beta2, lr, decay, clip, step,
            PARAMETER, DIRECTION, AVERAGE, RIGHT, FACTOR, ALIGNED, GROUPED, CHECKED, DENSE, FACTORED, ELEMENTWISE,
            AVERAGED, SPAN, CLAMP, FACTORS, FITTED, STOCHASTIC, EVEN, BLOCK_M, BLOCK_N, BLOCK_K, HELD
        )
    # fmt: on
