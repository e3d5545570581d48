"""Collectives of a step, which are counted, and which whoever records the step may run in every replay instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

Collective = Callable[[], None]
"""A collective with its tensors, which may be run again when these have other values."""


class Traffic:
    """Bytes that a process gave to collectives or received from gathering ones, and the number of collectives."""

    def __init__(self) -> None:
        self.bytes = self.collectives = 0

    def add(self, tensor: Tensor) -> None:
        """Count one collective over ``tensor``."""
        self.bytes += tensor.numel() * tensor.element_size()
        self.collectives += 1


TRAFFIC = Traffic()
"""Traffic of all optimizers' steps in this process."""

_taken: ContextVar[Callable[[Collective], None] | None] = ContextVar("whoever takes collectives", default=None)


@contextmanager
def taken_by(taker: Callable[[Collective], None]) -> Iterator[None]:
    """Within the context, give collectives to ``taker`` instead of running them."""
    token = _taken.set(taker)
    try:
        yield
    finally:
        _taken.reset(token)


def _communicate(counted: Tensor, collective: Collective) -> None:
    def run() -> None:
        TRAFFIC.add(counted)
        collective()

    taker = _taken.get()
    run() if taker is None else taker(run)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce ``tensor`` over the group in place."""
    _communicate(tensor, lambda: dist.all_reduce(tensor, op, group=group))


def all_gather(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> None:
    """Gather the ``part`` of every process, in order of their ranks, in ``whole``."""
    _communicate(whole, lambda: dist.all_gather_into_tensor(whole, part, group=group))


def all_to_all(received: Tensor, sent: Tensor, taken: list[int], given: list[int], group: dist.ProcessGroup) -> None:
    """Send so many rows as are ``given`` of ``sent`` to each process, and receive so many as are ``taken``."""
    # as bytes: not every backend knows every dtype
    into, rows = received.view(torch.uint8), sent.view(torch.uint8)
    _communicate(sent, lambda: dist.all_to_all_single(into, rows, taken, given, group=group))


def total(values: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Sum tensors of one dtype over processes, in place, with one collective."""
    flat = torch.cat([value.flatten() for value in values])
    all_reduce(flat, group)
    sums = flat.split([value.numel() for value in values])
    torch._foreach_copy_(values, [each.view(value.shape) for value, each in zip(values, sums, strict=True)])
    return values
