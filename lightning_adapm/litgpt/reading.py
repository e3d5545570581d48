"""Tensors that are mapped from a file, read by several threads to where they are used.

A copy of mapped memory waits for the disk page by page. Here large blocks are read at once, straight into the host's
memory or through small pinned buffers to a GPU.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_THREADS = 8
_BLOCK = 1 << 23
"""Bytes that a thread reads at a time."""
_AHEAD = 1 << 28
"""Bytes that are read ahead, because tensors may have to be converted one by one."""

_buffers = threading.local()

Read = Callable[[Iterable[Tensor], torch.device, torch.dtype], Iterator[Tensor]]
""":func:`placed`, or :func:`unread` where other values are about to come."""


def unread(tensors: Iterable[Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Allocate memory for tensors on a device, in a dtype, without reading their values."""
    return (torch.empty(tensor.shape, dtype=dtype, device=device) for tensor in tensors)


def placed(tensors: Iterable[Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """Copy tensors to a device and a dtype, one after another; those that are mapped from a file are read from it."""
    files = Files()
    waiting: deque[tuple[int, Callable[[], Tensor]]] = deque()
    with ExitStack() as opened, ThreadPoolExecutor(_THREADS) as pool:
        for tensor in tensors:
            source = files.source(tensor, opened) if device.type in ("cpu", "cuda") else None
            if source is None:
                waiting.append((0, partial(_moved, tensor, device, dtype)))
            else:
                target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                waiting.append((target.nbytes, partial(_finished, target, dtype, _begin(pool, source, target))))
            while sum(size for size, _ in waiting) > _AHEAD:
                yield waiting.popleft()[1]()
        while waiting:
            yield waiting.popleft()[1]()


class Source(NamedTuple):
    """Place of a tensor's bytes in an open file."""

    file: int
    offset: int


class _Region(NamedTuple):
    """Addresses that are mapped from a file."""

    start: int
    end: int
    offset: int
    inode: int
    path: str


class Files:
    """The files that this process has mapped into memory without changing anything there; Linux alone lists them."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._open: dict[str, int] = {}
        try:
            lines = Path("/proc/self/smaps").read_text(errors="surrogateescape").splitlines()
        except OSError:
            return
        region: _Region | None = None
        for line in lines:
            words = line.split(maxsplit=5)
            if not words[0].endswith(":"):
                region = _region(words)
            elif words[0] == "Anonymous:" and words[1] == "0" and region is not None:  # else it has pages of its own
                self._regions.append(region)

    def source(self, tensor: Tensor, opened: ExitStack) -> Source | None:
        """Find a tensor's bytes in a file, which stays open as long as ``opened``; None for any other tensor."""
        if not tensor.is_cpu or not tensor.is_contiguous() or not tensor.numel():
            return None
        first = tensor.data_ptr()
        for region in self._regions:
            if region.start <= first and first + tensor.nbytes <= region.end:
                file = self._opened(region, opened)
                return None if file is None else Source(file, region.offset + first - region.start)
        return None

    def _opened(self, region: _Region, opened: ExitStack) -> int | None:
        if region.path not in self._open:
            try:
                file = opened.enter_context(Path(region.path).open("rb"))  # noqa: SIM115
            except OSError:  # it was deleted
                return None
            if os.fstat(file.fileno()).st_ino != region.inode:  # it was replaced
                return None
            self._open[region.path] = file.fileno()
        return self._open[region.path]


def _region(words: list[str]) -> _Region | None:
    """A line of the list of mapped memory, if it is of a file."""
    if len(words) < 6 or not words[5].startswith("/"):
        return None
    addresses, _, offset, _, inode, path = words
    start, end = (int(address, 16) for address in addresses.split("-"))
    return _Region(start, end, int(offset, 16), int(inode), path)


def _begin(pool: ThreadPoolExecutor, source: Source, target: Tensor) -> list[Future[None]]:
    """Begin to read bytes into a tensor without gaps."""
    stream = torch.cuda.current_stream(target.device) if target.is_cuda else None
    blocks = target.view(-1).view(torch.uint8).split(_BLOCK)
    return [
        pool.submit(_read, source._replace(offset=source.offset + index * _BLOCK), block, stream)
        for index, block in enumerate(blocks)
    ]


def _finished(target: Tensor, dtype: torch.dtype, reads: list[Future[None]]) -> Tensor:
    for each in reads:
        each.result()
    return target.to(dtype)


def _read(source: Source, block: Tensor, stream: torch.cuda.Stream | None) -> None:
    if stream is None:
        _fill(block, source)
        return
    with torch.cuda.stream(stream):  # and on its device, where a new thread is not
        if not hasattr(_buffers, "pinned"):
            _buffers.pinned = torch.empty(_BLOCK, dtype=torch.uint8, device="cpu", pin_memory=True)
        pinned: Tensor = _buffers.pinned[: len(block)]
        _fill(pinned, source)
        block.copy_(pinned, non_blocking=True)
        stream.record_event().synchronize()  # the buffer is used again


def _fill(block: Tensor, source: Source) -> None:
    memory, (file, offset) = block.numpy().data, source
    while memory:
        count = os.preadv(file, [memory], offset)
        if not count:
            raise EOFError(f"a checkpoint of weights ends at byte {offset}, in the middle of a tensor; copy it again")
        memory, offset = memory[count:], offset + count


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    moved = tensor.to(device)  # by itself, because together with the dtype it would be converted on the host
    return moved.to(dtype, copy=tensor.device == moved.device)
