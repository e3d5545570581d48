"""Support for compiled loops on a CPU, which Numba compiles where it is installed: no compiler is needed there."""

import importlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators
from lightning_adapm.moments.tiles import tile_numel
from lightning_adapm.sharding.find import has_values

_FEWEST = 1 << 16
"""Fewest elements that are worth another thread."""

_PRODUCT = 1 << 17
"""Most elements of a product of factors for each thread, which its core's cache is to hold."""


def runs_on(device: torch.device) -> bool:
    """Whether the loops run on a device: on a CPU, where Numba is installed and compiles."""
    return device.type == "cpu" and _found()


@cache
def _found() -> bool:
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return False
    try:
        _loops()
    except (ImportError, RuntimeError):  # none, one for another NumPy, or no folder that keeps what it compiles
        return False
    return True


def _loops() -> Any:
    return importlib.import_module("lightning_adapm.step.numba_loops")


def movable(param: Tensor, grad: Tensor) -> bool:
    """Whether the loops support a parameter and its gradient: a matrix or a stack of them without gaps, in float32."""
    if not has_values(param) or grad.dim() not in (2, 3) or param.numel() != grad.numel() or not param.numel():
        return False
    return param.dtype == torch.float32 and param.is_contiguous() and grad.is_contiguous()


class Reading(NamedTuple):
    """Results of one pass over ``b`` matrices."""

    squares: Tensor
    """Sums of squares of rows, ``(b, m)``."""
    columns: Tensor | None
    """Sums of squares of columns, ``(b, n)``, if they were asked for."""
    projected: Tensor | None
    """Products with transposed bases, ``(b, m, r)``."""


def read(matrices: Sequence[Tensor], bases: Tensor | None, columns: bool) -> Reading:
    """Read matrices ``(m, n)`` once, with their products with ``bases`` ``(b, r, n)`` if there are any."""
    b, (m, n) = len(matrices), matrices[0].shape
    threads = _threads(m, m * n)
    squares, sums = torch.empty(b, m), torch.zeros(b, threads, n) if columns else None
    projected = None if bases is None else torch.empty(b, m, bases.shape[-2])
    for index, matrix in enumerate(matrices):
        own = [None if each is None else each[index] for each in (bases, projected, squares, sums)]
        _shared(partial(_read, *map(_array, (matrix, *own))), (0, m), threads)
    return Reading(squares, None if sums is None else sums.sum(dim=1), projected)


def _read(grad: Any, basis: Any, projected: Any, squares: Any, sums: Any, thread: int, first: int, last: int) -> None:
    _loops().read(grad, basis, projected, squares, None if sums is None else sums[thread], first, last)


class Average(NamedTuple):
    """Full momentum, which takes the gradient: values, or codes with their ``scales``."""

    values: Tensor
    beta1: float
    scales: Tensor | None = None


def move(
    param: Tensor,
    grad: Tensor,
    denominators: Denominators,
    *,
    rate: float,
    keep: float,
    bound: float | None = None,
    average: Average | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
    beta2: float | None = None,
) -> None:
    """``param = keep param - clamp(rate (grad + left right) / (roots / correction + eps))``, with torch's threads.

    All are of some rows of a matrix, or of some matrices of a stack; ``left`` ``(b, m, k)`` and ``right`` ``(b, k, n)``
    are the ``factors``. An ``average`` takes the gradient and stands in its place. With ``beta2``, the roots are still
    to be taken, of averages which take the gradient first.
    """
    if not param.numel():  # other processes hold all rows
        return
    (root,), correction, eps, columns, _ = denominators
    values, beta1, scales = average or (None, 0.0, None)
    squares = None if beta2 is None else root
    # an array in any case, because Numba types branches that are never taken
    roots = root.expand(*param.shape[:-1], 1).reshape(-1) if squares is None else root.new_empty(0)
    by_column = None if columns is None else columns[0].flatten(0, -2)
    matrices = [each if each is None else each.flatten(0, -2) for each in (param, grad, values, scales, squares)]
    rows = param.shape[:-1].numel()
    height = rows if by_column is None else rows // len(by_column)
    decay, bound = beta2 or 0.0, math.inf if bound is None else bound
    numbers = beta1, 1 - beta1, decay, 1 - decay, rate, correction, eps, keep, bound
    operands = [*map(_array, (*matrices, roots, by_column)), height, *map(np.float32, numbers)]
    threads = _threads(rows, param.numel())
    if factors is None:
        _shared(partial(_move, operands, None, 0), (0, rows), threads)
    else:
        _move_along(operands, factors, threads)
    torch.autograd.graph.increment_version(param)  # as every operation in place


def _move_along(operands: list[Any], factors: tuple[Tensor, Tensor], threads: int) -> None:
    """Move rows along products of factors, of as many at a time as the caches of cores hold."""
    lefts, rights = factors
    m, n = lefts.shape[1], rights.shape[2]
    count = min(m, max(1, min(threads * _PRODUCT, tile_numel(lefts)) // n))
    buffer = lefts.new_empty(count, n)
    for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        for first in range(0, m, count):
            some = left[first : first + count]
            product = torch.mm(some, right, out=buffer[: len(some)])
            origin = index * m + first
            work = partial(_move, operands, product.numpy(), origin)
            _shared(work, (origin, origin + len(some)), threads)


def _move(operands: list[Any], product: Any, origin: int, thread: int, first: int, last: int) -> None:
    _loops().move(product, origin, first, last, *operands)


def _array(tensor: Tensor | None) -> Any:
    """The memory of a tensor, as Numba sees it."""
    return None if tensor is None else tensor.detach().numpy()


def _threads(rows: int, numel: int) -> int:
    """Number of threads for so many rows, at most torch's."""
    return max(1, min(torch.get_num_threads(), rows, numel // _FEWEST))


def _shared(work: Callable[[int, int, int], None], rows: tuple[int, int], threads: int) -> None:
    """Share rows, the first and the one after the last, among threads: ``work`` is given the number of a thread and
    its rows.
    """
    first, last = rows
    if threads == 1:
        work(0, first, last)
        return
    ends = [first + (last - first) * index // threads for index in range(threads + 1)]
    pool = _pool(os.getpid(), threads - 1)  # a child process has no threads of its parent
    others = [pool.submit(work, index, *ends[index : index + 2]) for index in range(1, threads)]
    work(0, *ends[:2])
    for other in others:
        other.result()


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lightning-adapm")
