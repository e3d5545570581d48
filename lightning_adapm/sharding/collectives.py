"""Collectives of a step. They are counted, and a recorder of the step may take them over to run in every replay."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Collective = Callable[[], None]
"""Runs a collective over its tensors, or waits for one; may be called again when the tensors have other values."""
Borrowing = Callable[[Tensor], Tensor]
"""Returns the tensor that a collective keeps for a tensor of the step, whose memory may be reused after the step."""
Taker = Callable[[Callable[[Borrowing], Collective]], None]
"""Takes over a collective that is not yet bound to its tensors."""


class Traffic:
    """Bytes that a process sent to collectives or received from gathers, and the number of collectives."""

    def __init__(self) -> None:
        self.bytes = self.collectives = 0

    def add(self, nbytes: int) -> None:
        """Count one collective over ``nbytes``."""
        self.bytes += nbytes
        self.collectives += 1


TRAFFIC = Traffic()
"""Traffic of all optimizers' steps in this process."""


_taken: ContextVar[Taker | None] = ContextVar("taker of collectives", default=None)


@contextmanager
def taken_by(taker: Taker) -> Iterator[None]:
    """Within the context, give collectives to ``taker`` instead of running them."""
    token = _taken.set(taker)
    try:
        yield
    finally:
        _taken.reset(token)


def _run(bound: Callable[[Borrowing], Collective]) -> None:
    taker = _taken.get()
    bound(lambda tensor: tensor)() if taker is None else taker(bound)


class Planned(NamedTuple):
    """A collective over tensors, which begins when it is called with them; the bytes of the first one are counted."""

    tensors: tuple[Tensor, ...]
    call: Callable[..., dist.Work]


class Pending:
    """Collectives that begin together and are waited for together, while the device continues with other work.

    The memory of their tensors must not be reused before :meth:`wait`.
    """

    def __init__(self, planned: Sequence[Planned]) -> None:
        self._planned = planned
        self._begun: list[dist.Work] = []

    def bind(self, borrowed: Borrowing) -> Collective:
        """Return a function that begins them; it keeps their tensors, and this object no longer does."""
        planned, self._planned = self._planned, ()
        kept = [(each.call, [borrowed(tensor) for tensor in each.tensors]) for each in planned]

        def begin() -> None:
            for call, tensors in kept:
                TRAFFIC.add(tensors[0].nbytes)
                self._begun.append(call(*tensors))

        return begin

    def wait(self) -> None:
        """Let the device wait for them."""
        while self._begun:
            self._begun.pop().wait()


def begin_and_wait(begun: Pending | None, awaited: Pending | None) -> None:
    """Begin some collectives and wait for others, or for the same, with nothing in between."""

    def bound(borrowed: Borrowing) -> Collective:
        begin = None if begun is None else begun.bind(borrowed)

        def run() -> None:
            if begin is not None:
                begin()
            if awaited is not None:
                awaited.wait()

        return run

    _run(bound)


def all_reduce(tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce ``tensor`` over the group in place."""

    def bound(borrowed: Borrowing) -> Collective:
        kept = borrowed(tensor)

        def run() -> None:
            TRAFFIC.add(kept.nbytes)
            dist.all_reduce(kept, op, group=group)

        return run

    _run(bound)


def gathering(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> Planned:
    """Plan to gather the ``part`` of every process, in order of their ranks, in ``whole``."""
    # torch 2.13 renamed it, and warns of the old name
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return Planned((whole, part), lambda into, given: gather(into, given, group=group, async_op=True))


def summing(tensor: Tensor, group: dist.ProcessGroup) -> Planned:
    """Plan to sum ``tensor`` over the group in place."""
    return Planned((tensor,), lambda kept: dist.all_reduce(kept, dist.ReduceOp.SUM, group=group, async_op=True))


def exchanging(received: Tensor, sent: Tensor, taken: list[int], given: list[int], group: dist.ProcessGroup) -> Planned:
    """Plan to send ``given[i]`` rows of ``sent`` to process ``i``, and to receive ``taken[i]`` rows from it."""

    def call(rows: Tensor, into: Tensor) -> dist.Work:
        return dist.all_to_all_single(into, rows, taken, given, group=group, async_op=True)

    # as bytes: not every backend knows every dtype
    return Planned((sent.view(torch.uint8), received.view(torch.uint8)), call)


def total(values: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Sum tensors of one dtype over processes, in place, with one collective."""
    flat = torch.cat([value.flatten() for value in values])
    all_reduce(flat, group)
    sums = flat.split([value.numel() for value in values])
    torch._foreach_copy_(values, [each.view(value.shape) for value, each in zip(values, sums, strict=True)])
    return values
