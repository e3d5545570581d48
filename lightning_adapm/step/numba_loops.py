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
_WORD = np.int32(0x7FFFFFFF)

# a value that is not finite keeps its meaning, and sums may be added up in any order
_compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})


@_compiled
def read(grads, basis, projected, squares, columns, first, last):
    """Read the rows ``first`` to ``last`` once: ``squares`` ``(rows,)`` are their sums of squares, to which ``columns``
    ``(n,)`` add those of columns, and ``projected`` ``(rows, r)`` their products with the ``basis`` ``(r, n)``.

    Four rows are multiplied by four at a time, which is what registers hold.
    """
    n = grads.shape[1]
    for row in range(first, last, 4):
        row1, row2, row3 = min(row + 1, last - 1), min(row + 2, last - 1), min(row + 3, last - 1)
        g0, g1, g2, g3 = grads[row], grads[row1], grads[row2], grads[row3]
        sum0 = sum1 = sum2 = sum3 = _F(0)
        for i in range(n):
            sum0 += g0[i] * g0[i]
            sum1 += g1[i] * g1[i]
            sum2 += g2[i] * g2[i]
            sum3 += g3[i] * g3[i]
        squares[row], squares[row1], squares[row2], squares[row3] = sum0, sum1, sum2, sum3
        if columns is not None:
            for other in range(row, row3 + 1):
                grad = grads[other]
                for i in range(n):
                    columns[i] += grad[i] * grad[i]
        if basis is not None:
            r = basis.shape[0]
            for rank in range(0, r, 4):
                rank1, rank2, rank3 = min(rank + 1, r - 1), min(rank + 2, r - 1), min(rank + 3, r - 1)
                b0, b1, b2, b3 = basis[rank], basis[rank1], basis[rank2], basis[rank3]
                p00 = p01 = p02 = p03 = p10 = p11 = p12 = p13 = _F(0)
                p20 = p21 = p22 = p23 = p30 = p31 = p32 = p33 = _F(0)
                for i in range(n):
                    p00 += g0[i] * b0[i]
                    p01 += g0[i] * b1[i]
                    p02 += g0[i] * b2[i]
                    p03 += g0[i] * b3[i]
                    p10 += g1[i] * b0[i]
                    p11 += g1[i] * b1[i]
                    p12 += g1[i] * b2[i]
                    p13 += g1[i] * b3[i]
                    p20 += g2[i] * b0[i]
                    p21 += g2[i] * b1[i]
                    p22 += g2[i] * b2[i]
                    p23 += g2[i] * b3[i]
                    p30 += g3[i] * b0[i]
                    p31 += g3[i] * b1[i]
                    p32 += g3[i] * b2[i]
                    p33 += g3[i] * b3[i]
                for out, q0, q1, q2, q3 in (
                    (projected[row], p00, p01, p02, p03),
                    (projected[row1], p10, p11, p12, p13),
                    (projected[row2], p20, p21, p22, p23),
                    (projected[row3], p30, p31, p32, p33),
                ):
                    out[rank], out[rank1], out[rank2], out[rank3] = q0, q1, q2, q3


@_compiled
def move(
    product,
    origin,
    first,
    last,
    params,
    grads,
    averages,
    scales,
    squares,
    roots,
    columns,
    height,
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

    The ``product`` begins with the row ``origin``. ``averages`` take the gradient first and stand in its place, by
    ``weight1``; with ``scales`` they are codes of :mod:`lightning_adapm.moments.quantized`. Roots are those of
    ``squares``, averages of the squared gradient that take it first, by ``weight2``; without these ``roots``
    ``(rows,)``, where there are ``columns`` ``(matrices, n)`` times those of the matrix, which has ``height`` rows.
    """
    n = grads.shape[1]
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
                    more = product[row - origin, start:stop]
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
                    most = max(most, bits[i] & _WORD)  # the bits of magnitudes are in their order
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
                    update = rate * taken[i] / (np.sqrt(value) / correction + eps)
                    update = -bound if update < -bound else bound if update > bound else update
                    param[i] = keep * param[i] - update
            elif columns is not None:
                root, column = roots[row] / correction, columns[row // height, start:stop]
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
