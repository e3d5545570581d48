"""Support for the kernels of a CUDA step, and what all of them share: the dtype of products, sizes of tiles."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.sharding.find import has_values
from lightning_adapm.step.launch import DTYPES

FACTOR = torch.bfloat16
"""Dtype of the factors of a basis on their way to the parameters. Tensor cores multiply it twice as fast as TF32. The
average itself keeps its own precision, and the gradient is added in float32.
"""

MOST_COLUMNS = 1 << 21
"""Maximum number of tiles along columns in a grid."""


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device; Triton requires NVIDIA GPUs of compute capability 8.0 or higher."""
    return device.type == "cuda" and _supported(device)


@cache
def _supported(device: torch.device) -> bool:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def has_large_blocks(device: torch.device) -> bool:
    """Whether a block has the shared memory of a data center's GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


@cache
def has_largest_blocks(device: torch.device) -> bool:
    """Whether a block has 227 KiB of shared memory, more than an A100's."""
    return device.type != "cuda" or has_accelerator(device)


@cache
def has_accelerator(device: torch.device) -> bool:
    """Whether a GPU has a tensor memory accelerator."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))


def readable(matrices: Sequence[Tensor]) -> bool:
    """Whether tensors are vectors, matrices or stacks of matrices of one layout that the kernels support."""
    first = matrices[0]
    if not has_values(first):
        return False
    fits = first.dim() in (1, 2, 3) and first.numel() > 0 and first.shape[-1] <= MOST_COLUMNS
    return runs_on(first.device) and fits and _alike(matrices)


def movable(params: Sequence[Tensor], directions: Sequence[Tensor]) -> bool:
    """Whether the kernels support the layouts of parameters and of their directions."""
    param, matrix = params[0], directions[0]
    heads = param.dim() == 3 and matrix.dim() == 2 and (len(param) * param.shape[1], param.shape[2]) == matrix.shape
    fit = param.shape == matrix.shape or heads
    return readable(directions) and fit and _alike(params)


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors have one supported dtype and one layout without gaps in the last dimension."""
    first = tensors[0]
    if first.dtype not in DTYPES or first.stride(-1) != 1:
        return False
    shape, stride = first.shape, first.stride()
    return all(other.shape == shape and other.stride() == stride for other in tensors)


class Tile(NamedTuple):
    """The part of a matrix that a program works on at a time, and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int = 0
    """Most registers of a thread, so that more programs share a multiprocessor; 0 where the compiler decides."""

    def narrowed(self, n: int) -> "Tile":
        """Trade columns for rows where the matrix has fewer columns, ``n``."""
        columns = min(self.columns, max(16, power_of_two(n)))
        return self._replace(rows=self.rows * self.columns // columns, columns=columns)

    def grid(self, m: int, n: int, b: int) -> tuple[int, int, int]:
        """Programs for ``b`` matrices ``(m, n)``, one for each tile."""
        return -(-m // self.rows), -(-n // self.columns), b

    @property
    def constants(self) -> dict[str, int]:
        """The tile as constants of a kernel."""
        sizes = {"BLOCK_M": self.rows, "BLOCK_N": self.columns}
        bound = {"maxnreg": self.registers} if self.registers else {}
        return sizes | {"num_warps": self.warps, "num_stages": self.stages} | bound


def padded(r: int) -> int:
    """Columns of a left factor of rank ``r``, padded so that tensor cores can load its rows."""
    return -(-r // 16) * 16


def power_of_two(number: int) -> int:
    """Smallest power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()
