"""Products of low-rank factors in kernels: ``left`` ``(m, width)``, zero behind ``k``, and ``right`` ``(k, n)``.

``left`` is given as pointers to its rows.
"""

import triton
import triton.language as tl


@triton.jit
def part(left, mine, first, width, SIZE: tl.constexpr):
    """``SIZE`` columns of the left factor from the ``first`` on, for the rows that are ``mine``."""
    inner = first + tl.arange(0, SIZE)[None, :]
    return tl.load(left + inner, mine & (inner < width), 0.0)


@triton.jit
def add(total, a, right, first, column, n, k, FACTOR: tl.constexpr, SIZE: tl.constexpr):
    """``total`` plus the product of ``a``, a :func:`part` of the left factor, with its rows of the right one."""
    inner = first + tl.arange(0, SIZE)[:, None]
    b = tl.load(right + inner * n + column[None, :], (inner < k) & (column[None, :] < n), 0.0).to(FACTOR)
    return tl.dot(a, b, total)


@triton.jit
def low_rank(total, left, right, mine, column, n, k, width, FACTOR: tl.constexpr, BLOCK_K: tl.constexpr):
    """``total`` plus a tile of the product of both factors, in float32."""
    for start in range(0, width, BLOCK_K):
        total = add(total, part(left, mine, start, width, BLOCK_K), right, start, column, n, k, FACTOR, BLOCK_K)
    return total
