"""Launches of :mod:`lightning_adapm.step.triton_kernels`: addresses, compiled kernels, devices."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.cache import MOST, kept

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Dtypes that the kernels support, with Triton's names."""
_CODES = {torch.int8: "int8"}


MOST_BYTES_OF_TABLES = MOST * 512
"""Tables of up to 64 addresses each, in blocks of a CUDA allocator."""


class Matrices(NamedTuple):
    """Table of ``b`` matrices of one shape and layout; stacks are taken apart, and vectors are rows."""

    tensors: Sequence[Tensor]
    addresses: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], stacks: bool | None = None) -> "Matrices":
        """Collect the matrices. Three dimensions are stacks, or without ``stacks`` the heads of one matrix."""
        like = tensors[0]
        if not (like.dim() == 3 if stacks is None else stacks):
            return cls(tensors, tuple([tensor.data_ptr() for tensor in tensors]))
        apart, count = like.stride(0) * like.element_size(), len(like)
        firsts = [tensor.data_ptr() for tensor in tensors]
        return cls(tensors, tuple(first + index * apart for first in firsts for index in range(count)))

    @property
    def like(self) -> Tensor:
        """First tensor of the list, whose shape and layout all of them have."""
        return self.tensors[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of each matrix."""
        return (self.like.shape[-2] if self.like.dim() > 1 else 1), self.like.shape[-1]

    @property
    def stride(self) -> int:
        """Elements from one row to the next."""
        return self.like.stride(-2) if self.like.dim() > 1 else self.like.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of every matrix."""
        return self.like.dtype

    @property
    def table(self) -> Tensor:
        """Addresses of the matrices, on the device."""
        return self._placed[0]

    @property
    def aligned(self) -> bool:
        """Whether every row of every matrix begins at a multiple of 16 bytes."""
        size = self.like.element_size()
        whole = not any(n * size % 16 for n in self.like.stride()[:-1])
        return whole and self._placed[1]

    @property
    def _placed(self) -> tuple[Tensor, bool]:
        key = Addresses(self.addresses, self.like.device)
        return kept(key, partial(_placed, *key))  # memory is mostly where it was a step ago


def aligned(*operands: Matrices | None) -> bool:
    """Whether all operands that there are are :attr:`~Matrices.aligned`."""
    return all(matrices.aligned for matrices in operands if matrices is not None)


class Addresses(NamedTuple):
    """Key of a table of addresses among the tensors that are kept on a device."""

    numbers: tuple[int, ...]
    device: torch.device


def numbers_on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy numbers that are the same in every step to the device, in int64."""
    return kept((numbers, device), partial(_placed, numbers, device))[0]


def pinned(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers where a device can copy them from while the host goes on."""
    return torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")


def _placed(numbers: tuple[int, ...], device: torch.device) -> tuple[Tensor, bool]:
    table = pinned(numbers, torch.int64, device)
    return table.to(device, non_blocking=True), not any(number % 16 for number in numbers)


_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}


def launch(
    name: str,
    grid: tuple[int, int, int],
    operands: Sequence[Any],
    numbers: tuple[int, ...],
    scalars: tuple[float, ...],
    **constants: Any,
) -> None:
    """Launch a kernel of :mod:`lightning_adapm.step.triton_kernels` with its arguments in this order.

    Args:
        name: Name of the kernel.
        grid: Number of programs along each axis.
        operands: Tensors, descriptors, and :class:`Matrices`, of which the kernel is given the table. None is an
            operand that the kernel does not touch under these constants.
        numbers: Sizes and strides.
        scalars: Numbers in floating point.
        constants: Constants that the kernel is compiled for, by name.
    """
    tensors = [each.table if isinstance(each, Matrices) else each for each in operands]
    some = next(each for each in tensors if each is not None)
    start(name, grid, tuple(some if each is None else each for each in tensors), numbers, scalars, constants)


def start(
    name: str,
    grid: tuple[int, int, int],
    tensors: tuple[Any, ...],
    numbers: tuple[int, ...],
    scalars: tuple[float, ...],
    constants: dict[str, Any],
) -> None:
    """Start a kernel on tensors and descriptors.

    Compiled kernels are kept by everything that they depend on, and launched as in Triton's own tutorials, because
    asking Triton again takes the host longer than the launch.
    """
    device = tensors[0].device
    if 0 in grid:  # of what other processes hold
        return
    scalars = tuple(map(float, scalars))  # what is compiled for a float cannot be launched with an int
    kinds = [_kind(tensor) for tensor in tensors]
    key = name, device, numbers, *kinds, *constants.values()
    with _on(device):
        if key in _compiled:
            compiled, rest = _compiled[key]
            compiled[grid](*tensors, *numbers, *scalars, *rest)
            return
        from lightning_adapm.step import triton_kernels

        kernel = getattr(triton_kernels, name)
        named = {word: _of(each) if isinstance(each, torch.dtype) else each for word, each in constants.items()}
        compiled = kernel[grid](*tensors, *numbers, *scalars, **named)
        if compiled is not None:  # the interpreter compiles nothing
            _compiled[key] = compiled, [named[argument] for argument in kernel.arg_names if argument in named]


def described_by(matrices: Tensor, tile: tuple[int, int]) -> Any:
    """Descriptor of matrices ``(b, m, n)`` for the tensor memory accelerator, which moves tiles of one of them."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrices, list(matrices.shape), list(matrices.stride()), [1, *tile])


def _kind(argument: Any) -> tuple[Any, ...]:
    """Kind of a tensor or a descriptor, on which what is compiled depends."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return argument.base.dtype, *argument.block_shape


def _of(dtype: torch.dtype) -> Any:
    """Triton's name of a dtype."""
    import triton.language as tl

    return getattr(tl, (DTYPES | _CODES)[dtype])


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device current, because Triton launches on the current one."""
    current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(device)
