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
def bits(stream, row, column, n, step, EVEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Bits for the elements of a matrix of ``n`` columns in a step: at ``row`` ``(m, 1)``, from ``column`` on.

    ``stream`` is the address of the words of a key and the place of the first element, int64. Where all rows begin at
    ``EVEN`` places, the compiler sees that neighbors are pairs, and computes their word once.
    """
    first, second = tl.load(stream).to(tl.uint32), tl.load(stream + 1).to(tl.uint32)
    begin = (tl.load(stream + 2) + row * n + column).to(tl.uint32)
    aside = tl.arange(0, BLOCK_N)[None, :].to(tl.uint32)
    pair = ((begin >> 1) + (aside >> 1)) & 0x7FFFFFFF if EVEN else (begin + aside) >> 1
    odd = aside & 1 if EVEN else (begin + aside) & 1
    count = (tl.zeros((1, 1), tl.float32) + step).to(tl.int32).to(tl.uint32)  # of a number, for the interpreter
    word = scattered(pair, scattered(count, first, second), scattered(count, second, first))
    return tl.where(odd == 0, word, (word >> 16) | (word << 16))


@triton.jit
def rounded(values, bits, DTYPE: tl.constexpr):
    """Round float32 ``values`` to bfloat16 or float16, by 32 random ``bits`` each.

    A finite value beyond the range becomes the largest number; infinities and NaN stay.
    """
    raw = values.to(tl.uint32, bitcast=True)
    if tl.bfloat16 == DTYPE:  # the upper half, rounded up unless that would leave the range
        up = tl.where(tl.abs(values) < 3.3895313892515355e38, bits & 0xFFFF, 0)
        return ((raw + up) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    magnitude = raw & 0x7FFFFFFF
    up = tl.minimum((magnitude + (bits & 0x1FFF)) & 0xFFFFE000, 0x477FE000)
    scaled = tl.abs(values) * 16777216.0  # below 2^-14, multiples of 2^-24
    whole = tl.floor(scaled)
    more = (bits >> 8).to(tl.float32) * 5.9604644775390625e-08 < scaled - whole
    small = tl.where(more, whole + 1.0, whole) * 5.9604644775390625e-08
    up = tl.where(magnitude < 0x38800000, small.to(tl.uint32, bitcast=True), up)
    found = (up | (raw & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 0x7F800000, found, values).to(DTYPE)
