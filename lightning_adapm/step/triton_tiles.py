"""One tile of a matrix of parameters that :mod:`lightning_adapm.step.triton_moves` moves."""

import triton
import triton.language as tl

from lightning_adapm.step import triton_momentum, triton_products, triton_rounding


@triton.jit
def moved(
    parameters,
    directions,
    roots,
    averages,
    left,
    rights,
    root_columns,
    root_left,
    root_rights,
    streams,
    scales,
    held,
    root,
    counts,
    row,
    start,
    which,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HELD: tl.constexpr,
):
    """Move the tile of these rows whose columns begin at ``start``.

    Names are those of :func:`~lightning_adapm.step.triton_moves.move`. ``root`` is what rows have of their divisors,
    where these are ``DENSE``; a direction does not count unless it ``counts``. With ``HELD``, ``held`` are the rows of
    the left factor.
    """
    column = start + tl.arange(0, BLOCK_N)
    inside = (row[:, None] < m) & (column[None, :] < n)
    wide = row.to(tl.int64)[:, None]
    direction = tl.load(directions + which).to(tl.pointer_type(DIRECTION))
    if ALIGNED:
        direction = tl.multiple_of(direction, 16)
    d = tl.load(direction + wide * direction_stride + column[None, :], inside, 0.0).to(tl.float32)
    if HELD:
        product = triton_products.held(held, rights, which, column, n, k, RIGHT, FACTOR, ALIGNED, BLOCK_K)
    elif FACTORS:  # before the parameter is loaded: registers are short in the loop
        product = triton_products.low_rank(
            left, rights, which, row, column, m, n, k, width, RIGHT, FACTOR, FITTED, ALIGNED, BLOCK_K
        )
    if FITTED:
        fitted = triton_products.low_rank(
            root_left, root_rights, which, row, column, m, n, k, width, RIGHT, FACTOR, True, ALIGNED, BLOCK_K
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
        d = tl.where(counts, d, 0.0)
    if FACTORED:
        root = root * (1 / correction) * tl.load(root_columns + which * n + column[None, :], column[None, :] < n, 0.0)
    if FITTED:
        root = tl.sqrt(beta2 * fitted * fitted + (1 - beta2) * d * d)
    elif not DENSE:
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
        aside = start // BLOCK_N
        d = triton_momentum.averaged(
            averages, scales, which, row, column, aside, m, n, d, beta1, AVERAGE, ALIGNED, SPAN, BLOCK_M, BLOCK_N
        )
    if FACTORS:
        d += product
    if DENSE and not FACTORED:  # one division for a row
        update = d * (lr * scale / (root / correction + eps))
    else:
        divisor = (root if FACTORED else root * (1 / correction)) + eps
        if FITTED or (FACTORED and FACTORS and not HELD):  # not slower where products are in the way
            update = lr * scale * d / divisor
        else:  # by a root's reciprocal twice, which takes fewer instructions than a division
            inverse = tl.rsqrt(divisor)
            update = d * inverse * inverse * (lr * scale)
    if CLAMP:
        update = tl.minimum(tl.maximum(update, -lr * clip), lr * clip)
    p = p * (1 - lr * decay) - update
    if STOCHASTIC:
        random = triton_rounding.bits(streams + 3 * which, wide, start, n, step, EVEN, BLOCK_N)
        moved = triton_rounding.rounded(p, random, PARAMETER)
    else:
        moved = p.to(PARAMETER)
    tl.store(parameter, moved, inside)
