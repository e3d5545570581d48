"""Values of momentum in eight bits: codes with a scale for each block of a row.

A code ``c`` from -127 to 127 stands for ``sign(c) (c / 127)² A``, where ``A`` is the largest magnitude of its block:
small values have finer steps than large ones. Errors of directions, on the gradients of a small language model over 60
steps, relative to those of averages in float32, in norm and after the division by Adam's roots, in percent:

====================== ================== ==================== ===================
momentum, ``beta1``    squares, nearest   equal steps, nearest bitsandbytes' codes
====================== ================== ==================== ===================
full, 0.9              2.7, 2.9           2.8, 4.5             5.0, 5.0
full, 0.95             3.7, 4.9           3.9, 7.7             7.6, 8.9
low-rank, 0.9          5.5, 6.8           11, 14               not measured
low-rank, 0.95         3.6, 5.0           7.7, 11              not measured
====================== ================== ==================== ===================

Codes are rounded to the nearest. Stochastic rounding keeps an average from stalling where updates are below half a
code, and adds more noise than that is worth here: errors were 1.2 to 1.3 times as large. The largest
magnitude of a block has the code 127 exactly, so that values which were read and not changed are stored as they were.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_adapm.moments.storage import EXACT, State, Storage
from lightning_adapm.moments.tiles import spans

BLOCK = 256
"""Number of values of a row that have one scale; the last block of a row may be shorter."""
SHORTEST = 8
"""Rows of fewer values are not worth their scales."""
CODES, SCALE = "_codes", "_scale"

_TOP = 127


@dataclass(frozen=True)
class EightBits(Storage):
    """Codes in int8 under ``key_codes``, and the largest magnitudes of their blocks under ``key_scale``.

    A block is up to 256 values of a row, the last dimension. Scales have the dtype of the arithmetic: float32, or
    float64 for float64 parameters. Zeros stay zero. An infinity becomes the largest number and a NaN zero, and blocks
    whose values are all below the smallest normal number become zero.

    Bases are kept in bfloat16, in which kernels multiply them anyway: processes may share their columns, which blocks
    of a row would not survive.
    """

    plain: ClassVar[bool] = False
    rowwise: ClassVar[bool] = True
    suffixes: ClassVar[tuple[str, ...]] = (CODES, SCALE)

    @property
    def of_bases(self) -> Storage:
        return Storage(torch.bfloat16)

    def make(self, key: str, shape: torch.Size, like: Tensor) -> dict[str, Tensor]:
        scales = (*shape[:-1], -(-shape[-1] // BLOCK))
        return {key + CODES: like.new_zeros(shape, dtype=torch.int8), key + SCALE: like.new_zeros(scales)}

    def read(self, states: Sequence[State], key: str) -> list[Tensor]:
        codes, scales = ([state[key + suffix] for state in states] for suffix in self.suffixes)
        if len(codes) > 1 and _alike(codes):  # a few kernels for all of them
            return list(decoded_from(torch.stack(codes), torch.stack(scales)).unbind())
        return [decoded_from(*pair) for pair in zip(codes, scales, strict=True)]

    def write(self, states: Sequence[State], key: str, values: Sequence[Tensor]) -> None:
        codes, scales = ([state[key + suffix] for state in states] for suffix in self.suffixes)
        if len(codes) > 1 and _alike(codes):
            together = [each[0].new_empty((len(each), *each[0].shape)) for each in (codes, scales)]
            encode(torch.stack(list(values)), *together)
            for kept, new in zip((codes, scales), together, strict=True):
                torch._foreach_copy_(kept, list(new.unbind()))
            return
        for parts in zip(values, codes, scales, strict=True):
            encode(*parts)


def eight_bits_for(shape: torch.Size) -> Storage:
    """Storage in eight bits for an entry of ``shape``; vectors and short rows stay as they are."""
    return EightBits() if len(shape) >= 2 and shape[-1] >= SHORTEST else EXACT


def decoded_from(codes: Tensor, scales: Tensor) -> Tensor:
    """Values that ``codes`` stand for, in the dtype of their ``scales``."""
    values = codes.to(scales.dtype).div_(_TOP)
    values.mul_(values.abs())
    for block, scale in _blocks(values, scales):
        block.mul_(scale)
    return values


def encode(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Write the nearest codes of ``values`` and the scales of their blocks into ``codes`` and ``scales``."""
    if not values.numel():
        return
    values, codes, scales = values.flatten(0, -2), codes.flatten(0, -2), scales.flatten(0, -2)
    for first, last in spans(values):
        _encode(values[first:last], codes[first:last], scales[first:last])


def _encode(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    finfo = torch.finfo(scales.dtype)
    values = values.to(scales.dtype).nan_to_num(0.0, finfo.max, finfo.min)
    for block, scale in _blocks(values, scales):
        largest = block.abs().amax(dim=-1, keepdim=True)
        scale.copy_(torch.where(largest < finfo.tiny, 0.0, largest))
        block.div_(largest.clamp_min(finfo.tiny))
    roots = values.abs().sqrt_().mul_(_TOP).round_()
    codes.copy_(roots.copysign_(values))


def _alike(tensors: Sequence[Tensor]) -> bool:
    return all(tensor.shape == tensors[0].shape for tensor in tensors)


def _blocks(values: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the whole blocks of all rows ``(..., blocks, 256)`` and of what is left ``(..., 1, rest)``, each with
    that of its scales ``(..., blocks, 1)``.
    """
    whole = values.shape[-1] // BLOCK
    if whole:
        yield values[..., : whole * BLOCK].unflatten(-1, (whole, BLOCK)), scales[..., :whole, None]
    if values.shape[-1] % BLOCK:
        yield values[..., whole * BLOCK :].unsqueeze(-2), scales[..., whole:, None]
