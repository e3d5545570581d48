"""Triton kernel that copies the bases that a refresh begins with."""

import triton
import triton.language as tl


@triton.jit
def sketch(
    bases,
    starting,
    joined,
    sketched,
    r,
    n,
    BASIS: tl.constexpr,
    FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy ``bases`` ``(r, n)`` into ``joined`` ``(b, r, n)``, float32, and into ``sketched``, which has rows of
    ``starting`` ``(r, n)`` in the place of those that are zero.
    """
    rank, which = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    basis = tl.load(bases + which).to(tl.pointer_type(BASIS)) + rank * n
    line = (which * r + rank) * n
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(basis + column, column < n, 0.0).to(tl.float32)
        tl.store(joined + line + column, value, column < n)
        count += tl.where(value == 0, 0, 1)
    empty = tl.zeros((BLOCK,), tl.int32) + tl.sum(count, 0) == 0
    for start in range(0, n, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(basis + column, column < n, 0.0).to(tl.float32)
        value += tl.load(starting + rank * n + column, (column < n) & empty, 0.0)
        tl.store(sketched + line + column, value.to(FACTOR), column < n)
