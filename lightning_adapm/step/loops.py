"""Support for compiled loops on a CPU, which Numba compiles where it is installed: no compiler is needed there."""

import importlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators
from lightning_adapm.moments.tiles import tile_numel
from lightning_adapm.sharding.find import has_values

_Result = TypeVar("_Result")

_FEWEST = 1 << 16
"""Fewest elements that are worth another thread."""

_CACHED = 1 << 17
"""Most elements of rows that each thread multiplies at once, which its core's cache is to hold."""


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


@cache
def _loops() -> Any:
    return importlib.import_module("lightning_adapm.step.numba_loops")


def movable(param: Tensor, grad: Tensor) -> bool:
    """Whether the loops support a parameter and its gradient: a matrix or a stack of them without gaps, in float32."""
    if not has_values(param) or grad.dim() not in (2, 3) or param.numel() != grad.numel() or not param.numel():
        return False
    return param.dtype == torch.float32 and param.is_contiguous() and grad.is_contiguous()


class _Local(threading.local):
    threads: int | None = None
    """Torch's number of threads, while the loops have them."""


_LOCAL = _Local()


@contextmanager
def threads_for_loops() -> Iterator[None]:
    """Leave torch a single thread, and the loops all the others.

    After each of torch's operations, OpenMP's threads go on spinning for up to 10 ms, on cores that the loops need.
    """
    threads = torch.get_num_threads()
    if _LOCAL.threads is not None or threads == 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        _LOCAL.threads = threads
        yield
    finally:
        torch.set_num_threads(threads)
        _LOCAL.threads = None


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
    squares = matrices[0].new_empty(b, m)
    cut = _Cut(squares, b, m, n)
    sums = squares.new_zeros(cut.threads, b, n) if columns else None
    projected = None if bases is None else squares.new_empty(b, m, bases.shape[-2])
    read_rows, grads = _loops().read, _arrays(matrices)
    found, added = squares.numpy(), None if sums is None else sums.numpy()

    def work(thread: int, index: int, first: int, last: int) -> None:
        column = None if added is None else added[thread, index]
        # the library multiplies by transposed matrices slowly where their rows lie a power of two apart
        transposed = None if bases is None else bases[index].mT.contiguous()
        for start, stop in cut.cached(first, last):
            read_rows(grads[index], found[index], column, start, stop)
            if projected is not None and transposed is not None:
                rows = slice(start, stop)
                torch.mm(matrices[index][rows], transposed, out=projected[index, rows])

    cut.share(work)
    return Reading(squares, None if sums is None else sums.sum(dim=0), projected)


def multiply(matrices: Sequence[Tensor], others: Tensor) -> Tensor:
    """Products of matrices ``(m, n)`` with ``others`` ``(b, n, r)``, ``(b, m, r)``."""
    b, (m, n) = len(matrices), matrices[0].shape
    product, others = others.new_empty(b, m, others.shape[-1]), others.contiguous()
    cut = _Cut(product, b, m, n)

    def work(thread: int, index: int, first: int, last: int) -> None:
        for start, stop in cut.cached(first, last):
            torch.mm(matrices[index][start:stop], others[index], out=product[index, start:stop])

    cut.share(work)
    return product


def multiply_left(matrices: Sequence[Tensor], others: Tensor) -> Tensor:
    """Products of ``others`` ``(b, r, m)`` with matrices ``(m, n)``, ``(b, r, n)``."""
    b, (m, n) = len(matrices), matrices[0].shape
    product = others.new_empty(b, others.shape[-2], n)

    def work(thread: int, index: int, first: int, last: int) -> None:
        torch.mm(others[index], matrices[index][:, first:last], out=product[index, :, first:last])

    _Cut(product, b, n, m, in_threads=True).share(work)
    return product


def advancing(lefts: Sequence[Tensor]) -> bool:
    """Whether the loops support left factors of momentum: without gaps, in float32 or bfloat16."""
    return all(left.dtype in (torch.float32, torch.bfloat16) and left.is_contiguous() for left in lefts)


def advance(projected: Tensor, lefts: Sequence[Tensor], beta1: float, correction: float) -> None:
    """Take products of gradients ``(b, m, r)`` into ``lefts``, left factors of averages of matrices or stacks, and let
    the products become ``left / correction`` less themselves.
    """
    halves = lefts[0].dtype == torch.bfloat16
    kept = _arrays([left.view(torch.int16) for left in lefts] if halves else lefts)
    numbers = np.float32(1 - beta1), np.float32(1 / correction)
    b, m, r = projected.shape
    advance_rows, products = _loops().advance, projected.reshape(b, -1).numpy()

    def work(thread: int, index: int, first: int, last: int) -> None:
        left = kept[index].reshape(-1)
        own = (None, left) if halves else (left, None)
        advance_rows(products[index], *own, *numbers, first * r, last * r)

    _Cut(projected, b, m, r).share(work)


class Average(NamedTuple):
    """Full momentum, which takes the gradients: values, or codes with their ``scales``."""

    values: list[Tensor]
    beta1: float
    scales: list[Tensor] | None = None


def move(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
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

    All are of matrices or stacks of one shape, or of some rows of them; ``left`` ``(b, m, k)`` and ``right``
    ``(b, k, n)`` are the ``factors``. An ``average`` takes the gradient and stands in its place. With ``beta2``, the
    roots are still to be taken, of averages which take the gradient first.
    """
    if not params[0].numel():  # other processes hold all rows
        return
    roots, correction, eps, columns, _ = denominators
    values, beta1, scales = average or (None, 0.0, None)
    moved = _arrays(params)
    b, (m, n) = len(moved), moved[0].shape
    none: list[Any] = [None] * b
    squares = none if beta2 is None else _arrays(roots)
    # an array in any case, because Numba types branches that are never taken
    by_row = [np.empty(0, np.float32)] * b if beta2 is not None else _rows(roots, params[0], m)
    by_column = none if columns is None else [each for part in columns for each in part.reshape(-1, n).numpy()]
    parts = (moved, _arrays(grads), *(none if each is None else _arrays(each) for each in (values, scales)))
    operands = list(zip(*parts, squares, by_row, by_column, strict=True))
    decay, bound = beta2 or 0.0, math.inf if bound is None else bound
    numbers = tuple(map(np.float32, (beta1, 1 - beta1, decay, 1 - decay, rate, correction, eps, keep, bound)))
    move_rows, cut = _loops().move, _Cut(params[0], b, m, n)
    left, right = factors or (None, None)
    products = None if left is None else left.new_empty(cut.threads, cut.count, n)

    def work(thread: int, index: int, first: int, last: int) -> None:
        if left is None or right is None or products is None:
            move_rows(None, first, last, *operands[index], *numbers)
            return
        for start, stop in cut.cached(first, last):
            product = torch.mm(left[index, start:stop], right[index], out=products[thread, : stop - start])
            move_rows(product.numpy(), start, stop, *operands[index], *numbers)

    cut.share(work)
    torch.autograd.graph.increment_version(params)  # as every operation in place


def _arrays(tensors: Sequence[Tensor]) -> list[Any]:
    """The memory of matrices and of those of stacks, as Numba sees it."""
    arrays = (tensor.detach().numpy() for tensor in tensors)
    return [matrix for array in arrays for matrix in (array if array.ndim == 3 else (array,))]


def _rows(roots: Sequence[Tensor], param: Tensor, m: int) -> list[Any]:
    """Roots for each row of each matrix."""
    shape = (*param.shape[:-1], 1)
    return [each for root in roots for each in root.expand(shape).reshape(-1, m).numpy()]


class _Cut:
    """Cut of ``b`` matrices ``(m, n)`` into rows for threads. Products of the same rows are computed together on any
    number of threads, because their last bits may depend on it.
    """

    def __init__(self, like: Tensor, b: int, m: int, n: int, in_threads: bool = False) -> None:
        most = _most_threads()
        largest = min(_CACHED, tile_numel(like)) // n
        self.count = min(m, max(1, -(-m // -(-most // b)) if in_threads else largest))
        self._high, self._rows = -(-m // self.count), m
        self._pieces = b * self._high
        self.threads = max(1, min(most, self._pieces, b * m * n // _FEWEST))

    def cached(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cut rows of a matrix, the first and the one after the last, into those that a cache holds."""
        for start in range(first, last, self.count):
            yield start, min(start + self.count, last)

    def share(self, work: Callable[[int, int, int, int], None]) -> None:
        """Share rows among threads: ``work`` is given the number of a thread, that of a matrix, and its rows."""
        _together(partial(self._do, work), self.threads)

    def _do(self, work: Callable[[int, int, int, int], None], thread: int) -> None:
        first, last = (self._pieces * each // self.threads for each in (thread, thread + 1))
        while first < last:
            index, piece = divmod(first, self._high)
            end = min(self._high, piece + last - first)
            work(thread, index, piece * self.count, min(end * self.count, self._rows))
            first += end - piece


def in_threads(number: int, work: Callable[[slice], _Result]) -> list[_Result]:
    """Results of ``work`` on some of so many parts in each thread."""
    threads = min(_most_threads(), number)
    ends = [number * thread // threads for thread in range(threads + 1)]
    found: dict[int, _Result] = {}

    def one(thread: int) -> None:
        found[thread] = work(slice(ends[thread], ends[thread + 1]))

    _together(one, threads)
    return [found[thread] for thread in range(threads)]


def _most_threads() -> int:
    return _LOCAL.threads or torch.get_num_threads()


def _together(work: Callable[[int], None], threads: int) -> None:
    """Run ``work`` for each number below ``threads``, in at most so many threads, of which this one is the first."""
    if threads == 1:
        work(0)
        return
    left = deque(range(threads))  # whoever has time takes the next, so that none is waited for that never starts
    pool = _pool(os.getpid(), threads - 1)  # a child process has no threads of its parent
    others: list[Future[None]] = []
    with suppress(RuntimeError):  # Python starts no more threads once the main one has ended
        for _ in range(1, threads):
            others.append(pool.submit(copy_context().run, _alone, work, left))
    most, _LOCAL.threads = _LOCAL.threads, 1  # the pool is taken
    try:
        _each(work, left)
    finally:
        _LOCAL.threads = most
        for other in others:
            other.result()


def _alone(work: Callable[[int], None], left: deque[int]) -> None:
    if torch.get_num_threads() > 1:  # this thread's own
        torch.set_num_threads(1)
    with torch.no_grad():  # which every thread has its own of, too
        _each(work, left)


def _each(work: Callable[[int], None], left: deque[int]) -> None:
    while True:
        try:
            number = left.popleft()
        except IndexError:
            return
        work(number)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lightning-adapm")
