"""Stochastic rounding in Triton kernels, with the bits of :mod:`lightning_adapm.step.rounding`."""

import triton
import triton.language as tl


@triton.jit
def scattered(counter, first, second):
    """32 random bits for a counter under a key of two words, all uint32."""
    counter = counter ^ first
    counter = (counter ^ (counter >> 16)) * 0x21F0AAAD
    counter = ((counter ^ (counter >> 15)) + second) * 0xD35A2D97
    return counter ^ (counter >> 15)


@triton.jit
def bits(stream, row, column, n, step):
    """Bits for the elements of a matrix of ``n`` columns in a step: at ``row`` ``(m, 1)``, ``column`` ``(1, n)``.

    ``stream`` is the address of the words of a key and the place of the first element, int64.
    """
    first, second = tl.load(stream).to(tl.uint32), tl.load(stream + 1).to(tl.uint32)
    place = (tl.load(stream + 2) + row * n).to(tl.uint32) + column.to(tl.uint32)
    count = (tl.zeros((1, 1), tl.float32) + step).to(tl.int32).to(tl.uint32)  # of a number, for the interpreter
    return scattered(place, scattered(count, first, second), scattered(count, second, first))


@triton.jit
def rounded(values, bits, DTYPE: tl.constexpr):
    """Round float32 ``values`` to numbers of bfloat16 or float16, in float32, by 32 random ``bits`` each.

    A finite value beyond the range becomes the largest number; infinities and NaN stay.
    """
    raw = values.to(tl.uint32, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    if tl.float16 == DTYPE:
        up = tl.minimum((magnitude + (bits & 0x1FFF)) & 0xFFFFE000, 0x477FE000)
        scaled = tl.abs(values) * 16777216.0  # below 2^-14, multiples of 2^-24
        whole = tl.floor(scaled)
        more = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 < scaled - whole
        small = tl.where(more, whole + 1.0, whole) * 5.9604644775390625e-08
        up = tl.where(magnitude < 0x38800000, small.to(tl.uint32, bitcast=True), up)
    else:
        up = tl.minimum((magnitude + (bits & 0xFFFF)) & 0xFFFF0000, 0x7F7F0000)
    found = (up | (raw & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 0x7F800000, found, values)
