"""Products in kernels, of low-rank factors among them."""

import triton
import triton.language as tl


@triton.jit
def added(a, b, total, FACTOR: tl.constexpr, SPLIT: tl.constexpr):
    """``total + a b`` with operands rounded to ``FACTOR``; where ``SPLIT``, in nearly float32's precision.

    Then what rounding leaves of either operand is multiplied by the other one, too.
    """
    high, other = a.to(FACTOR), b.to(FACTOR)
    total = tl.dot(high, other, total)
    if SPLIT:
        total = tl.dot((a - high.to(tl.float32)).to(FACTOR), other, total)
        total = tl.dot(high, (b - other.to(tl.float32)).to(FACTOR), total)
    return total


@triton.jit
def low_rank(
    left,
    rights,
    which,
    row,
    column,
    m,
    n,
    k,
    width,
    RIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    SPLIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of ``left right`` for one matrix, in float32.

    ``left`` is ``(b, m, width)``, zero behind ``k``, and ``rights`` are addresses of ``(k, n)``. Factors that are
    ``SPLIT`` are in float32.
    """
    right = tl.load(rights + which).to(tl.pointer_type(RIGHT))
    if ALIGNED:
        right = tl.multiple_of(right, 16)
    product = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for start in range(0, width, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        own = left + which * m * width + row.to(tl.int64)[:, None] * width + inner[None, :]
        a = tl.load(own, (row[:, None] < m) & (inner[None, :] < width), 0.0)
        other = right + inner[:, None] * n + column[None, :]
        b = tl.load(other, (inner[:, None] < k) & (column[None, :] < n), 0.0)
        product = added(a, b, product, FACTOR, SPLIT)
    return product


@triton.jit
def held(
    own,
    rights,
    which,
    column,
    n,
    k,
    RIGHT: tl.constexpr,
    FACTOR: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same of rows ``own`` of the left factor that a program holds, all of its ``BLOCK_K`` columns."""
    right = tl.load(rights + which).to(tl.pointer_type(RIGHT))
    if ALIGNED:
        right = tl.multiple_of(right, 16)
    inner = tl.arange(0, BLOCK_K)
    other = right + inner[:, None] * n + column[None, :]
    return tl.dot(own, tl.load(other, (inner[:, None] < k) & (column[None, :] < n), 0.0).to(FACTOR))
