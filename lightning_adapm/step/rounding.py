"""Stochastic rounding of parameters below float32, by random bits that are a function of what is rounded.

An update of less than half a unit in the last place is lost by rounding to nearest, in every step anew. Rounded up or
down at random, with the probabilities that make the mean right, it counts. The bits for an element depend on the name
of its parameter, its place in the matrix and the number of the step alone. No generator has a state, so a run that
resumes goes on bit by bit, copies on several processes round alike, and shards round as one device would.
:mod:`lightning_adapm.step.triton_rounding` does the same in kernels.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_adapm.roles.context import normalize
from lightning_adapm.step.launch import numbers_on
from lightning_adapm.step.parts import Part

ROUNDINGS = ("stochastic", "nearest")

DROPPED = {torch.bfloat16: 16, torch.float16: 13}
"""Dtypes that are rounded, with the bits of float32's mantissa that a normal number of each has no room for."""

_FACTORS, _WORD = (0x21F0AAAD, 0xD35A2D97), 0xFFFFFFFF
_SMALLEST_NORMAL, _SUBNORMALS = 2.0**-14, 2.0**24  # of float16: below the former, numbers are multiples of 1 / latter
_CHUNK_NUMEL = {"cpu": 1 << 16}  # what stays in a core's cache
_LARGEST_CHUNK_NUMEL = 1 << 22

_Word = TypeVar("_Word", int, Tensor)


def scattered(counter: _Word, first: int, second: int) -> _Word:
    """32 random bits for a counter under a key of two words: two rounds of xorshift and multiplication.

    The constants are those of a 32-bit hash of low bias, found by https://github.com/skeeto/hash-prospector.
    Numbers and int64 tensors hold 32 bits each.
    """
    counter = counter ^ first
    counter = ((counter ^ (counter >> 16)) * _FACTORS[0]) & _WORD
    counter = (((counter ^ (counter >> 15)) + second) * _FACTORS[1]) & _WORD
    return counter ^ (counter >> 15)


class Stream(NamedTuple):
    """The random bits of one part: in each step one word for every two elements of its matrix, to the second of which
    it shows the other half first.
    """

    first: int
    second: int
    """The two words of the stream's key."""
    start: int
    """Index in the matrix, row by row, of the first element that this process holds."""

    @classmethod
    def of(cls, part: Part) -> "Stream":
        return cls(*_words(part.name, part.prefix), part.first_element)

    def bits(self, place: int, count: int, step: int, device: torch.device | None = None) -> Tensor:
        """Bits of a step, in int64, for so many elements from ``place`` on, counted from this process's first one."""
        first, second = scattered(step, self.first, self.second), scattered(step, self.second, self.first)
        place += self.start
        pairs = torch.arange(place >> 1, (place + count + 1) >> 1, device=device) & (_WORD >> 1)
        words = scattered(pairs, first, second)
        both = torch.stack((words, (words >> 16 | words << 16) & _WORD), dim=1)
        return both.view(-1)[place & 1 :][:count]


@lru_cache(maxsize=1 << 16)
def _words(name: str, piece: str) -> tuple[int, int]:
    """Key of a piece, the same whatever wraps the model and whichever other parameters are trained."""
    digest = blake2b(f"{normalize(name)} {piece}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


class StochasticRounding(NamedTuple):
    """Stochastic rounding of the parameters of a batch in one step."""

    streams: tuple[Stream, ...]
    """One for each parameter."""
    step: int

    def table(self, numel: int, count: int, device: torch.device) -> Tensor:
        """Keys and first elements of ``count`` matrices of ``numel`` elements, for kernels; stacks are several each."""
        each = count // len(self.streams)
        rows = ((*stream[:2], stream.start + numel * index) for stream in self.streams for index in range(each))
        return numbers_on(tuple(chain.from_iterable(rows)), device)

    def is_even(self, columns: int) -> bool:
        """Whether all rows of so many ``columns`` begin with the first element of a pair."""
        return not (columns % 2 or any(stream.start % 2 for stream in self.streams))

    def write(self, params: Sequence[Tensor], values: Sequence[Tensor], first: int = 0) -> None:
        """Write float32 values, which are overwritten, as :func:`widened` makes them.

        ``first`` is the first row of a single parameter that they are some rows of.
        """
        for stream, param, value in zip(self.streams, params, values, strict=True):
            flat, before = value.view(-1), first * value[:1].numel() if first else 0
            size = _CHUNK_NUMEL.get(flat.device.type, _LARGEST_CHUNK_NUMEL)
            for start in range(0, flat.numel(), size):
                chunk = flat[start : start + size]
                bits = stream.bits(before + start, len(chunk), self.step, flat.device)
                chunk.copy_(rounded(chunk, bits, param.dtype))
        torch._foreach_copy_(list(params), list(values))


def rounding_of(parts: Sequence[Part], step: int, group: Mapping[str, Any]) -> StochasticRounding | None:
    """Rounding of parts that step together; None to nearest, as torch converts, or where nothing is rounded."""
    if group["rounding"] != "stochastic" or parts[0].param.dtype not in DROPPED:
        return None
    return StochasticRounding(tuple(map(Stream.of, parts)), step)


def widened(params: Sequence[Tensor]) -> list[Tensor]:
    """Copies of parameters in float32, with their elements row by row in memory."""
    return [param.to(torch.float32, memory_format=torch.contiguous_format) for param in params]


def rounded(values: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 values to one of the two nearest numbers of ``dtype``, by 32 random ``bits`` each in int64.

    The result is in float32. A finite value beyond the range becomes the largest number; infinities and NaN stay.
    """
    dropped = DROPPED[dtype]
    below = (1 << dropped) - 1
    # the bits of a float are a sign and a magnitude: a carry out of the mantissa goes on to the exponent
    raw = (values.view(torch.int32) + (bits & below).to(torch.int32)) & ~below
    found = raw.view(torch.float32)
    if dtype == torch.float16:
        found = torch.where(values.abs() < _SMALLEST_NORMAL, _rounded_subnormals(values, bits), found)
    top = torch.finfo(dtype).max
    return torch.where(values.isfinite(), found.clamp(-top, top), values)


def _rounded_subnormals(values: Tensor, bits: Tensor) -> Tensor:
    """Round to multiples of float16's smallest number. Every operation is exact."""
    scaled = values.abs() * _SUBNORMALS
    whole = scaled.floor()
    up = (bits >> 8).to(torch.float32) * 2.0**-24 < scaled - whole
    return ((whole + up) / _SUBNORMALS).copysign(values)
