"""Compiled loops of a step on a CPU: what :mod:`lightning_adapm.step.triton_kernels` are on a GPU.

Numba compiles them on the user's machine by its own LLVM, for vectors of that machine, and keeps the result on disk. A
reader, a linter and ``NUMBA_DISABLE_JIT=1``, by which tests run them, see plain Python. Arrays are float32, matrices
``(rows, n)`` without gaps, or None.
"""

import numpy as np
from numba import njit

from lightning_adapm.moments.quantized import BLOCK

_F = np.float32
_ONE, _TOP, _LARGEST, _TINY = _F(1), _F(127), _F(3.4028234e38), _F(1.1754944e-38)
_WORD, _HALF = np.int32(0x7FFFFFFF), np.int32(0x7FFF)

# a value that is not finite keeps its meaning
_FAST = {"contract", "nsz"}
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST)
# sums may be added up in any order; elsewhere, divisions would be moved into loops
_summing = njit(nogil=True, cache=True, error_model="numpy", fastmath=_FAST | {"reassoc"})


@_summing
def read(grads, squares, columns, first, last):
    """Read the rows ``first`` to ``last``: ``squares`` ``(rows,)`` become their sums of squares, to which ``columns``
    ``(n,)`` add those of columns.
    """
    n = grads.shape[1]
    quarter = (last - first) // 4
    for row0 in range(first, first + quarter):  # four rows far apart: memory gives out a third more than of one
        row1, row2, row3 = row0 + quarter, row0 + 2 * quarter, row0 + 3 * quarter
        grad0, grad1, grad2, grad3 = grads[row0], grads[row1], grads[row2], grads[row3]
        sum0 = sum1 = sum2 = sum3 = _F(0)
        for i in range(n):
            sum0 += grad0[i] * grad0[i]
            sum1 += grad1[i] * grad1[i]
            sum2 += grad2[i] * grad2[i]
            sum3 += grad3[i] * grad3[i]
        squares[row0], squares[row1], squares[row2], squares[row3] = sum0, sum1, sum2, sum3
    for row in range(first + 4 * quarter, last):
        grad = grads[row]
        rest = _F(0)
        for i in range(n):
            rest += grad[i] * grad[i]
        squares[row] = rest
    if columns is not None:
        for row in range(first, last):
            grad = grads[row]
            for i in range(n):
                columns[i] += grad[i] * grad[i]


@_compiled
def advance(projected, left, halves, weight1, inverse, first, last):
    """Take the products ``first`` to ``last`` into ``left``, by ``weight1``, and let these become what ``left``, times
    ``inverse``, differs in from them. All are flat; ``halves`` are the bits of a ``left`` in bfloat16.
    """
    taken = np.empty(BLOCK, np.float32)
    bits = taken.view(np.int32)
    for start in range(first, last, BLOCK):
        stop = min(last, start + BLOCK)
        count = stop - start
        product = projected[start:stop]
        if left is not None:
            values = left[start:stop]
            for i in range(count):
                value = values[i] + weight1 * (product[i] - values[i])
                values[i] = value
                product[i] = value * inverse - product[i]
        if halves is not None:
            half = halves[start:stop]
            for i in range(count):
                bits[i] = np.int32(half[i]) << 16
            for i in range(count):
                value = taken[i] + weight1 * (product[i] - taken[i])
                taken[i] = value
                product[i] = value * inverse - product[i]
            for i in range(count):  # to the nearest, of two as near to the even one
                half[i] = np.int16((bits[i] + _HALF + ((bits[i] >> 16) & 1)) >> 16)


@_compiled
def move(
    product,
    first,
    last,
    params,
    grads,
    averages,
    scales,
    squares,
    roots,
    columns,
    beta1,
    weight1,
    beta2,
    weight2,
    rate,
    correction,
    eps,
    keep,
    bound,
):
    """``param = keep param - clamp(rate (grad + product) / (root / correction + eps))`` in rows ``first`` to ``last``.

    The ``product`` begins with the row ``first``. ``averages`` take the gradient first and stand in its place, by
    ``weight1``; with ``scales`` they are codes of :mod:`lightning_adapm.moments.quantized`. Roots are those of
    ``squares``, averages of the squared gradient that take it first, by ``weight2``; without these ``roots``
    ``(rows,)``, where there are ``columns`` ``(n,)`` times those.
    """
    n = grads.shape[1]
    scaled_rate, scaled_eps = rate * correction, eps * correction  # a division less
    taken = np.empty(BLOCK, np.float32)
    bits = taken.view(np.int32)
    largest = np.empty(1, np.float32)
    largest_bits = largest.view(np.int32)
    for row in range(first, last):
        for block in range(-(-n // BLOCK)):
            start = block * BLOCK
            stop = min(n, start + BLOCK)
            count = stop - start
            grad, param = grads[row, start:stop], params[row, start:stop]
            if averages is None:
                if product is None:
                    for i in range(count):
                        taken[i] = grad[i]
                else:
                    more = product[row - first, start:stop]
                    for i in range(count):
                        taken[i] = grad[i] + more[i]
            elif scales is None:
                average = averages[row, start:stop]
                for i in range(count):
                    value = average[i] + weight1 * (grad[i] - average[i])
                    average[i] = value
                    taken[i] = value
            else:
                codes = averages[row, start:stop]
                scale = scales[row, block]
                most = np.int32(0)
                for i in range(count):
                    share = _F(codes[i]) * (_ONE / _TOP)
                    value = share * abs(share) * scale
                    value += weight1 * (grad[i] - value)
                    value = min(max(value, -_LARGEST), _LARGEST)
                    taken[i] = value
                for i in range(count):  # apart, because loops that write what they read are not vectorized
                    most = max(most, np.int32(bits[i] & _WORD))  # the bits of magnitudes are in their order
                largest_bits[0] = most
                scales[row, block] = largest[0] if largest[0] >= _TINY else _F(0)
                inverse = _TOP * _TOP / max(largest[0], _TINY)
                for i in range(count):
                    code = np.int32(np.sqrt(abs(taken[i]) * inverse) + _F(0.5))
                    codes[i] = np.int8(-code if taken[i] < _F(0) else code)
            if squares is not None:
                square = squares[row, start:stop]
                for i in range(count):
                    value = beta2 * square[i] + weight2 * (grad[i] * grad[i])
                    square[i] = value
                    update = scaled_rate * taken[i] / (np.sqrt(value) + scaled_eps)
                    update = -bound if update < -bound else bound if update > bound else update
                    param[i] = keep * param[i] - update
            elif columns is not None:
                root, column = roots[row] / correction, columns[start:stop]
                for i in range(count):
                    update = rate * taken[i] / (root * column[i] + eps)
                    update = -bound if update < -bound else bound if update > bound else update
                    param[i] = keep * param[i] - update
            else:
                factor = rate / (roots[row] / correction + eps)
                for i in range(count):
                    update = factor * taken[i]
                    update = -bound if update < -bound else bound if update > bound else update
                    param[i] = keep * param[i] - update
