"""Timing and counting of a step, on a CPU and on a GPU."""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd import DeviceType

from benchmarks.costs.memory import AllocationTracker

Step = Callable[[], object]
INTERVAL = 10
"""Steps in a turn of an optimizer that refreshes that often: each of its bases is refreshed once in a turn."""


def time_steps(step: Step, steps: int, device: str) -> list[float]:
    """Seconds of each of ``steps`` steps in a row.

    On a GPU between events in its stream, after one more step and without waiting in between: the host runs ahead as it
    does in training, and a step that the host cannot launch fast enough takes as long as the launches.
    """
    if device != "cuda":
        taken = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
        return taken
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize()
    for event in events:
        step()
        event.record()
    torch.cuda.synchronize()
    return [1e-3 * first.elapsed_time(then) for first, then in pairwise(events)]


def launched(step: Step, steps: int, device: str, held: Sequence[Tensor]) -> float:
    """Kernels per step on a GPU, by the profiler; on a CPU operations of torch."""
    if device != "cuda":
        tracker = AllocationTracker({"held": held})
        with tracker.following():
            for _ in range(steps):
                step()
        return tracker.operations / steps
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    # an optimizer's step is also an annotation on the device's time line; copies and fills are no kernels
    other = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")
    events = (event for event in profile.events() or () if event.device_type == DeviceType.CUDA)
    return sum(not event.name.startswith(other) for event in events) / steps


def transient_bytes(step: Step, steps: int, device: str, held: Sequence[Tensor]) -> int:
    """Maximum number of bytes allocated at once during a step, in addition to those before it.

    On a GPU by the allocator, on a CPU of the tensors that operations return (:class:`AllocationTracker`).
    """
    if device != "cuda":
        tracker = AllocationTracker({"held": held})
        with tracker.following():
            for _ in range(steps):
                step()
        return tracker.peak.total() - tracker.peak["held"]
    most = 0
    for _ in range(steps):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        most = max(most, torch.cuda.max_memory_allocated() - before)
    return most


def bandwidth(device: str, repeats: int = 10) -> float:
    """Bytes read and written per second by the fastest of some copies and scalings in place, larger than every cache.

    A CPU reads what a copy writes before it writes it, which a step in place does not.
    """
    source = torch.ones((1 << 28) if device == "cuda" else (1 << 26), device=device)
    target = torch.empty_like(source)
    seconds = time_steps(lambda: target.copy_(source), repeats, device)
    seconds += time_steps(lambda: target.mul_(1.0), repeats, device)
    return 2 * source.nbytes / min(seconds)
