"""Triton kernels that read gradients: their products with bases, flaws, and sums of squares.

As in :mod:`lightning_adapm.step.triton_kernels`, gradients lie anywhere, at addresses in tables.
"""

import triton
import triton.language as tl

from lightning_adapm.step import triton_products


@triton.jit
def read(
    grads,
    bases,
    projected,
    squares,
    flaws,
    sums,
    m,
    n,
    r,
    width,
    stride,
    each,
    one,
    GRAD: tl.constexpr,
    BASIS: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    PROJECT: tl.constexpr,
    SPLIT: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MORE_R: tl.constexpr,
):
    """Read matrices ``(m, n)`` at ``grads``.

    Where ``PROJECT``, ``projected`` ``(b, m, width)`` are their products with the transposed ``bases`` ``(r, n)``, zero
    behind ``r``. Where this is the ``FIRST`` reading, ``squares`` ``(b, m)`` are the sums of squares of rows, and
    ``flaws`` are set; with ``COLUMNS``, ``sums`` ``(b, tiles of rows, n)`` are those of each tile's columns. Products
    may be ``SPLIT``, and of ``ABSOLUTE`` values. A program multiplies by ``BLOCK_R`` ranks and ``MORE_R`` behind them,
    because the size of a block is a power of two.
    """
    # programs that share a gradient's rows follow each other: all but the first find them in the cache
    ranks = tl.cdiv(width, BLOCK_R + MORE_R) if PROJECT else 1
    high = tl.program_id(0) // ranks
    row = high * BLOCK_M + tl.arange(0, BLOCK_M)
    which = tl.program_id(1).to(tl.int64)
    rank = tl.program_id(0) % ranks * (BLOCK_R + MORE_R) + tl.arange(0, BLOCK_R)
    grad = tl.load(grads + which).to(tl.pointer_type(GRAD))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    grad += row.to(tl.int64)[:, None] * stride
    WATCHED: tl.constexpr = PROJECT and (COLUMNS or SPLIT)  # these take longer, or have no registers, otherwise
    # a thread has neighbors: their sums need fewer registers
    square = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.float32)
    flaw = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.float32)
    product = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = tl.program_id(0) % ranks == 0
    if COLUMNS:
        sums += (which * tl.cdiv(m, BLOCK_M) + high) * n
    if PROJECT:
        basis = tl.load(bases + which).to(tl.pointer_type(BASIS))
        if ALIGNED:
            basis = tl.multiple_of(basis, 16)
        out = projected + which * m * width + row.to(tl.int64)[:, None] * width
    if MORE_R:
        more = tl.program_id(0) % ranks * (BLOCK_R + MORE_R) + BLOCK_R + tl.arange(0, MORE_R)
        further = tl.zeros((BLOCK_M, MORE_R), tl.float32)
    for start in range(0, n, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        g = tl.load(grad + column[None, :], (row[:, None] < m) & (column[None, :] < n), 0.0).to(tl.float32)
        if FIRST:
            square += tl.sum((g * g).reshape(BLOCK_M, BLOCK_N // 4, 4), 2)
            if WATCHED:
                flaw += tl.sum((g * 0.0).reshape(BLOCK_M, BLOCK_N // 4, 4), 2)
            if COLUMNS:
                tl.store(sums + column, tl.sum(g * g, 0), (column < n) & first)
        if PROJECT:
            # a value of its own: what is copied to shared memory for a product and used for more comes out wrong
            multiplied = tl.abs(g) * one if ABSOLUTE else g * one
            part = _rows_of(basis, rank, column, r, n)
            product = triton_products.added(multiplied, tl.trans(part), product, FACTOR, SPLIT)
            if MORE_R:
                part = _rows_of(basis, more, column, r, n)
                further = triton_products.added(multiplied, tl.trans(part), further, FACTOR, SPLIT)
    if PROJECT:
        tl.store(out + rank[None, :], product, (row[:, None] < m) & (rank[None, :] < width))
    if MORE_R:
        tl.store(out + more[None, :], further, (row[:, None] < m) & (more[None, :] < width))
    if FIRST and first:
        of_rows = tl.sum(square, 1)
        tl.store(squares + which * m + row, of_rows, row < m)
        total = tl.sum(of_rows, 0)
        if total - total != 0.0:  # squares of large finite entries overflow, too: only these rows are read again
            if not WATCHED:
                for start in range(0, n, BLOCK_N):
                    column = start + tl.arange(0, BLOCK_N)
                    g = tl.load(grad + column[None, :], (row[:, None] < m) & (column[None, :] < n), 0.0).to(tl.float32)
                    flaw += tl.sum((g * 0.0).reshape(BLOCK_M, BLOCK_N // 4, 4), 2)
            total = tl.sum(tl.sum(flaw, 1), 0)
            if total != total:
                tl.store(flaws + which // each, 1)


@triton.jit
def _rows_of(basis, rank, column, r, n):
    """Some columns of some rows of a basis ``(r, n)``, zero outside."""
    return tl.load(basis + rank[:, None] * n + column[None, :], (rank[:, None] < r) & (column[None, :] < n), 0.0)


@triton.jit
def sum_squares(
    grads,
    squares,
    sums,
    flaws,
    m,
    n,
    stride,
    rows,
    each,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``sums`` ``(b, parts, n)``: sums of squares of columns of matrices, over so many ``rows`` each. Where this is the
    ``FIRST`` reading, ``squares`` ``(tiles of columns, b, m)`` are those of each tile's rows, and ``flaws`` are set.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1).to(tl.int64)
    first, end = tl.program_id(2) * rows, min((tl.program_id(2) + 1) * rows, m)
    grad = tl.load(grads + which).to(tl.pointer_type(GRAD))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    squares += (tl.program_id(0) * tl.num_programs(1) + which) * m
    square = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(first, end, BLOCK_M, num_stages=STAGES):
        row = start + tl.arange(0, BLOCK_M)
        at = grad + row.to(tl.int64)[:, None] * stride + column[None, :]
        g = tl.load(at, (row[:, None] < m) & (column[None, :] < n), 0.0).to(tl.float32)
        square += g * g
        if FIRST:
            tl.store(squares + row, tl.sum(g * g, 1), row < m)
    of_columns = tl.sum(square, 0)
    tl.store(sums + (which * tl.num_programs(2) + tl.program_id(2)) * n + column, of_columns, column < n)
    if FIRST:
        total = tl.sum(of_columns, 0)
        if total - total != 0.0:  # squares of large finite entries overflow, too
            flaw = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(first, end, BLOCK_M):
                row = start + tl.arange(0, BLOCK_M)
                at = grad + row.to(tl.int64)[:, None] * stride + column[None, :]
                flaw += tl.load(at, (row[:, None] < m) & (column[None, :] < n), 0.0).to(tl.float32) * 0.0
            total = tl.sum(tl.sum(flaw, 1), 0)
            if total != total:
                tl.store(flaws + which // each, 1)


@triton.jit
def combine(
    grads,
    weights,
    flaws,
    combined,
    m,
    n,
    r,
    stride,
    each,
    rows,
    GRAD: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHECKED: tl.constexpr,
    SPLIT: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``combined`` ``(b, parts, r, n)``: transposed ``weights`` ``(b, m, r)`` times matrices, over so many ``rows``
    each, where ``CHECKED`` zero those with a flaw. Products may be ``SPLIT``, and of ``ABSOLUTE`` values.
    """
    ranks = tl.cdiv(r, BLOCK_R)
    column = tl.program_id(0) // ranks * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    rank = tl.program_id(0) % ranks * BLOCK_R + tl.arange(0, BLOCK_R)
    grad = tl.load(grads + which).to(tl.pointer_type(GRAD))
    if ALIGNED:
        grad = tl.multiple_of(grad, 16)
    counts = tl.load(flaws + which // each) == 0 if CHECKED else True
    product = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(part * rows, min((part + 1) * rows, m), BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        at = grad + row.to(tl.int64)[:, None] * stride + column[None, :]
        g = tl.load(at, (row[:, None] < m) & (column[None, :] < n), 0.0).to(tl.float32)
        if CHECKED:
            g = tl.where(counts, g, 0.0)
        if ABSOLUTE:
            g = tl.abs(g)
        at = weights + which * m * r + row.to(tl.int64)[:, None] * r + rank[None, :]
        weight = tl.load(at, (row[:, None] < m) & (rank[None, :] < r), 0.0)
        product = triton_products.added(tl.trans(weight), g, product, FACTOR, SPLIT)
    out = combined + (which * tl.num_programs(2) + part) * r * n + rank[:, None] * n + column[None, :]
    tl.store(out, product, (rank[:, None] < r) & (column[None, :] < n))


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
