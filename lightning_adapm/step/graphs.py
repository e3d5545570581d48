"""Work on a device, captured once as CUDA graphs and then replayed."""

import warnings
import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_adapm.sharding.collectives import Borrowing, Collective, taken_by

_LARGEST_BLOCK = 1 << 29
"""Maximum number of bytes set aside for temporaries in advance. More are allocated as needed."""


class Graph(Protocol):
    """Captured work, which is launched on the device as a whole."""

    def replay(self) -> None: ...


def can_capture(device: torch.device) -> bool:
    """Whether work on a device can be captured now: it is a real GPU, and no other capture is in progress."""
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()  # under FakeTensorMode any machine has GPUs
    return on_gpu and not torch.cuda.is_current_stream_capturing()


def new_pool() -> Any:
    """Pool of memory for temporaries of graphs that are replayed one after another."""
    return torch.cuda.graph_pool_handle()


class Pool:
    """Memory for temporaries of graphs that are replayed one after another, whoever keeps them."""

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._handle: Any = None
        self._bytes = self._most = 0

    def need(self, nbytes: int) -> int:
        """Note that a graph would take ``nbytes``, and return the largest such number so far."""
        self._most = max(self._most, nbytes)
        return self._most

    @property
    def nbytes(self) -> int:
        """Bytes that it has allocated for graphs that are still kept."""
        return self._bytes if self._graphs else 0

    def captured(self, work: Callable[[], None], device: torch.device) -> Graph:
        """Capture what ``work`` launches on a device, without running it."""
        if not self._graphs:  # memory that has lost its graphs cannot be used again
            self._handle, self._bytes = new_pool(), 0
            work = partial(self._in_one_block, work, device)
        _make_workspace(device)
        before = reserved(device)
        graph = captured(work, device, self._handle)
        self._graphs.add(graph)
        self._bytes += max(0, reserved(device) - before)
        return graph

    def _in_one_block(self, work: Callable[[], None], device: torch.device) -> None:
        """Do what is captured first, with one block of memory for all temporaries.

        An allocator would make a block for one of them after another, of sizes that do not fit the next: twice as much.
        """
        torch.UntypedStorage(min(self._most, _LARGEST_BLOCK), device=device)  # given up at once
        work()


class Section(Graph, Protocol):
    """Work that is captured from its beginning to its end, without running."""

    def end(self) -> None: ...


class Sections:
    """A graph with collectives, which run between graphs.

    Some processes may replay a step that others launch: a collective is the same in both cases, so none has to know
    what the others do. Nor does a graph keep a communicator from being destroyed.
    """

    def __init__(self) -> None:
        self._runs: list[Callable[[], None]] = []

    def capture(self, work: Callable[[], None], begun: Callable[[], Section]) -> None:
        """Capture what ``work`` launches, in sections that have ``begun`` and that end where a collective is."""
        section = begun()

        def take(bound: Callable[[Borrowing], Collective]) -> None:
            nonlocal section
            section.end()
            self._runs += section.replay, bound(borrowed)
            section = begun()

        try:
            with taken_by(take):
                work()
        finally:
            section.end()
        self._runs.append(section.replay)

    def replay(self) -> None:
        for run in self._runs:
            run()


class CudaSection:
    """A CUDA graph of what is launched on the current stream.

    Other threads may go on: those that load data pin memory, and those that communicate ask for events, which a capture
    of the whole process would not allow.
    """

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")

    def end(self) -> None:
        with warnings.catch_warnings():  # a process without rows launches nothing between collectives
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


def captured(work: Callable[[], None], device: torch.device, pool: Any) -> Graph:
    """Capture what ``work`` launches, without running it."""
    sections = Sections()
    with torch.cuda.device(device):
        stream, current = _stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            sections.capture(work, partial(CudaSection, pool))
        current.wait_stream(stream)
    return sections


class _Memory:
    """The memory of a tensor, as numba describes arrays on a device to others."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "version": 2,
            "typestr": "|u1",
            "shape": (tensor.nbytes,),
            "data": (tensor.data_ptr(), False),
        }


def borrowed(tensor: Tensor) -> Tensor:
    """Return a tensor in the memory of another one without gaps, without keeping that memory from other use.

    Tensors that are exchanged between graphs lie in the graphs' pool. If every collective held its own, a recorded step
    would need the memory of all that it exchanges.
    """
    if tensor.device.type != "cuda" or not tensor.numel():
        return tensor
    found = torch.as_tensor(_Memory(tensor), device=tensor.device)
    return found.view(tensor.dtype).view(tensor.shape)


def reserved(device: torch.device) -> int:
    """Bytes that the allocator of a device has taken from it."""
    return torch.cuda.memory_reserved(device)


def memory(device: torch.device) -> int:
    """Bytes of memory that a device has."""
    return torch.cuda.get_device_properties(device).total_memory


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of captures, one for each device: cuBLAS keeps a workspace for every stream that it has worked on."""
    return torch.cuda.Stream(device)


def _make_workspace(device: torch.device) -> None:
    """Make cuBLAS's workspace for captures, so that it belongs to no graph, unless it is there.

    Every thread has its own, that of backward as well, and Lightning frees all of them after a run.
    """
    if device.type != "cuda":
        return
    with torch.cuda.stream(_stream(device)):
        for dtype in (torch.float32, torch.float64):
            torch.ones(1, 16, 16, dtype=dtype, device=device).matmul(torch.ones(1, 16, 16, dtype=dtype, device=device))
