"""Work on a device that is captured once and replayed, as a CUDA graph."""

from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """Captured work, whose launches are given to the device together."""

    def replay(self) -> None: ...


def can_capture(device: torch.device) -> bool:
    """Whether work on a device can be captured now: it is a GPU's, and nobody is capturing it."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def new_pool() -> Any:
    """Pool of memory for temporaries of graphs that are replayed one after another."""
    return torch.cuda.graph_pool_handle()


def captured(work: Callable[[], None], device: torch.device, pool: Any) -> Graph:
    """Capture what ``work`` launches, without running it.

    Other threads may go on: those that load data pin memory, and those that communicate ask for events, which a capture
    of the whole process would not allow.
    """
    with torch.cuda.device(device):
        graph, stream, current = torch.cuda.CUDAGraph(), _stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
    return graph


def reserved(device: torch.device) -> int:
    """Bytes that the allocator of a device has taken from it."""
    return torch.cuda.memory_reserved(device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of captures, one for each device: cuBLAS keeps a workspace for every stream that it has worked on.

    The workspace is made here, so that it belongs to no graph.
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for dtype in (torch.float32, torch.float64):
            torch.ones(1, 16, 16, dtype=dtype, device=device).matmul(torch.ones(1, 16, 16, dtype=dtype, device=device))
    return stream
