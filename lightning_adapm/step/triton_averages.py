"""Triton kernels that take readings of gradients into averages.

As in :mod:`lightning_adapm.step.triton_kernels`, state lies anywhere, at addresses in tables.
"""

import triton
import triton.language as tl


@triton.jit
def advance(
    projected,
    squares,
    flaws,
    lefts,
    averages,
    moved,
    factors,
    lengths,
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
    MEASURED: tl.constexpr,
    BLOCKS: tl.constexpr,
    SHARED: tl.constexpr,
    CLOCKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Take what :func:`read` found into the low-rank momentum and the second moments of blocks of rows.

    Where ``LOW_RANK``, ``lefts`` ``(m, r)`` become ``beta1 left + (1 - beta1) projected``, with ``projected``
    ``(b, m, projected_width)``, and ``factors`` ``(b, m, width)`` ``left / correction - projected``, zero behind ``r``.
    Where a basis was ``REFRESHED``, ``moved``, laid out as ``projected``, are in the place of the lefts that there
    were, and the factors are ``[left / correction - projected - flush moved, flush left]`` with these at last.
    Where ``MEASURED``, ``lengths`` ``(b, m)`` are the sums of squares of the rows of the factors.
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
        ranks = width - r if REFRESHED else width  # of two factors side by side, zero behind both
        length = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, ranks, BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)[None, :]
            own = mine[:, None] & (rank < r)
            p = tl.where(counts, tl.load(projected + line * projected_width + rank, own, 0.0), 0.0)
            at = left + row.to(tl.int64)[:, None] * r + rank
            old = tl.load(at, own, 0.0).to(tl.float32)
            before = tl.load(moved + line * projected_width + rank, own, 0.0) if REFRESHED else old
            kept = before + (1 - beta1) * (p - before)
            factor = kept / correction - p
            if tl.float16 == LEFT:  # an infinity would stay forever
                kept = tl.minimum(tl.maximum(kept, -65504.0), 65504.0)
            tl.store(at, kept.to(LEFT), own)
            if REFRESHED:
                paid = factors + line * width + r + rank
                tl.store(paid, (flush * old).to(FACTOR), mine[:, None] & (r + rank < width))
                factor -= flush * before
                tl.store(factors + line * width + rank, factor.to(FACTOR), own)
                if MEASURED:
                    length += tl.sum(flush * old * flush * old, 1)
            else:
                tl.store(factors + line * width + rank, factor.to(FACTOR), mine[:, None] & (rank < width))
            if MEASURED:
                length += tl.sum(factor * factor, 1)
        if MEASURED:
            tl.store(lengths + which * m + row, length, mine)


@triton.jit
def weigh(
    projected,
    lefts,
    flaws,
    lengths,
    squares,
    weights,
    m,
    r,
    width,
    each,
    beta1,
    tiny,
    LEFT: tl.constexpr,
    FACTOR: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Where ``SCALED``, ``weights`` ``(b, m, r)`` are ``beta1 left + (1 - beta1) projected``, whose columns are divided
    by the roots of ``lengths`` ``(b, r)``, their sums of squares in float64. Otherwise ``squares`` ``(b, tiles, r)``
    are these sums over the rows of each tile.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    which = tl.program_id(1).to(tl.int64)
    inside = (row[:, None] < m) & (rank[None, :] < r)
    wide = row.to(tl.int64)[:, None]
    p = tl.load(projected + which * m * width + wide * width + rank[None, :], inside, 0.0)
    p = tl.where(tl.load(flaws + which // each) == 0, p, 0.0)
    left = tl.load(lefts + which).to(tl.pointer_type(LEFT))
    before = tl.load(left + wide * r + rank[None, :], inside, 0.0).to(tl.float32)
    seen = before + (1 - beta1) * (p - before)
    if SCALED:
        length = tl.maximum(tl.sqrt(tl.load(lengths + which * r + rank, rank < r, 1.0)), tiny)
        seen *= (1 / length).to(tl.float32)[None, :]
        tl.store(weights + which * m * r + wide * r + rank[None, :], seen.to(FACTOR), inside)
    else:  # the square of a small gradient is zero in float32
        exact = seen.to(tl.float64)
        at = squares + (which * tl.num_programs(0) + tl.program_id(0)) * r + rank
        tl.store(at, tl.sum(exact * exact, 0), rank < r)


@triton.jit
def factor(
    squares,
    sums,
    flaws,
    row_averages,
    column_averages,
    shares,
    clock,
    m,
    n,
    each,
    rows,
    columns,
    largest,
    tiny,
    beta2,
    extra,
    ROWS: tl.constexpr,
    CLOCKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take sums of squares of rows, ``squares`` ``(b, m)``, and of columns, ``sums`` ``(b, n)``, into averages of their
    means, each not above ``largest``, plus ``extra``; ``rows``, those that columns have, and ``columns``, which is
    ``n``, are in floating point.

    ``shares`` ``(b, m)`` are the roots of the averages of rows over their mean, which is that of columns, whoever holds
    the rows; without averages of ``ROWS``, they are left as they are. The roots of the averages of columns overwrite
    the sums. Where ``CLOCKED``, ``beta2`` is read from the :class:`~lightning_adapm.step.clock.Clock` at ``clock``.
    """
    if CLOCKED:
        beta2 = tl.load(clock + 5)
    beta2 = tl.full((1,), 1.0, tl.float32) * beta2  # numbers of the host have float64's digits in the interpreter
    which = tl.program_id(0).to(tl.int64)
    counts = tl.load(flaws + which // each) == 0
    averages = tl.load(column_averages + which).to(tl.pointer_type(tl.float32))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = sums + which * n + column
        mean = tl.where(counts, tl.load(at, column < n, 0.0), 0.0) / rows
        mean = tl.minimum(mean, largest) + extra
        value = beta2 * tl.load(averages + column, column < n, 0.0) + (1 - beta2) * mean
        tl.store(averages + column, value, column < n)
        tl.store(at, tl.sqrt(value), column < n)
        total += tl.where(column < n, value, 0.0)
    if ROWS:
        whole = tl.maximum(tl.sum(total, 0) / columns, tiny)
        averages = tl.load(row_averages + which).to(tl.pointer_type(tl.float32))
        for start in range(0, m, BLOCK):
            row = start + tl.arange(0, BLOCK)
            mean = tl.where(counts, tl.load(squares + which * m + row, row < m, 0.0), 0.0) / columns
            mean = tl.minimum(mean, largest) + extra
            value = beta2 * tl.load(averages + row, row < m, 0.0) + (1 - beta2) * mean
            tl.store(averages + row, value, row < m)
            tl.store(shares + which * m + row, tl.sqrt(value / whole), row < m)
