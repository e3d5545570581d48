"""The launches of one step as CUDA graphs, which are replayed in later steps, with other gradients.

Kernels find gradients through tables of addresses on the device, and what the host knows of a step in
:class:`~lightning_adapm.step.clock.Clock`. Before a replay, both are written by copies that nobody waits for.
Everything else lies where it lay, which :class:`lightning_adapm.step.recorder.Signature` checks.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.cache import DeviceCache, using
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.clock import Clock
from lightning_adapm.step.graphs import Graph, Pool
from lightning_adapm.step.launch import Addresses, pinned
from lightning_adapm.step.parts import Part
from lightning_adapm.step.work import Work

_WIDTH = 4
"""Room for a clock, in elements of eight bytes, so that each clock is aligned like an allocation."""
_TABLES_OF_A_PART = 64

Clocks = Callable[[Batch, float], Tensor]
"""Returns the clock on the device for a batch and its learning rate."""


class Found(NamedTuple):
    """Findings of kernels about the gradients of some parts."""

    parts: Sequence[Part]
    flaws: Tensor
    """One number for each part, which is not 0 if its gradient was not finite."""
    squares: Sequence[Tensor]
    """Sums of squares of the rows of all gradients, in no order."""


class NotRecordableError(RuntimeError):
    """A step cannot be recorded, for the reason in the message."""


class Timed(NamedTuple):
    """The part whose step and learning rate a clock shows."""

    part: Part
    work: int
    """Index of the group's work."""
    place: int
    """Index of the parameter in that work."""

    def clock(self, works: Sequence[Work]) -> Clock:
        """The numbers of a step."""
        work = works[self.work]
        return Clock.of(self.part, work.counts[self.place], work.group["lr"])


class StaticTensors(DeviceCache):
    """The tensors that stay on the device between a capture and its replays: tables of addresses, clocks, and what is
    kept from step to step anyway.

    Args:
        cache: What is kept.
        works: The step.
    """

    def __init__(self, cache: DeviceCache, works: Sequence[Work]) -> None:
        super().__init__()
        self._cache = cache
        grads = [grad for work in works for grad in work.grads]
        self._spans = sorted((grad.data_ptr(), _extent(grad), index) for index, grad in enumerate(grads))
        self._timed = {
            part.key: Timed(part, index, place)
            for index, work in enumerate(works)
            for place, parts in enumerate(work.parts)
            for part in parts
        }
        self.device = grads[0].device
        room, clocks = _TABLES_OF_A_PART * len(self._timed), _WIDTH * len(self._timed)
        self._fixed = torch.empty(room, dtype=torch.int64, device=self.device)
        self._changing = torch.empty(clocks + room, dtype=torch.int64, device=self.device)
        """Clocks, followed by tables of gradients, so that one copy fills all."""
        self._clocks, self._moving = self._changing.split((clocks, room))
        self._held_fast: list[Any] = []
        """Tensors that the graph reads, kept alive here."""
        self._tables: dict[Addresses, tuple[Tensor, bool]] = {}
        self._addresses: list[int] = []
        self._places: list[tuple[int, int]] = []
        """Gradients in the tables, as index and distance in bytes."""
        self._clocked: list[Timed] = []

    @property
    def nbytes(self) -> int:
        return self._fixed.nbytes + self._changing.nbytes

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if isinstance(key, Addresses):
            if key not in self._tables:
                self._tables[key] = self._table(key.numbers), not any(number % 16 for number in key.numbers)
            return self._tables[key]
        if key not in self._cache:
            raise NotRecordableError("a tensor that is made once was not there")
        found = self._cache.get(key, make)
        self._held_fast.append(found)
        return found

    def clock(self, batch: Batch, lr: float) -> Tensor:
        """Return the clock of a batch; :meth:`update` will write its learning rate."""
        if any(self._in_gradients(grad.data_ptr()) is None for grad in batch.grads if grad.numel()):
            raise NotRecordableError("a gradient is copied before kernels read it")
        self._clocked.append(self._timed[batch.parts[0].key])
        start = _WIDTH * (len(self._clocked) - 1)
        return self._clocks[start : start + _WIDTH].view(torch.float32)[: len(Clock._fields)]

    def _table(self, addresses: Sequence[int]) -> Tensor:
        found = [self._in_gradients(address) for address in addresses]
        inside = [place for place in found if place is not None]
        padding = len(addresses) % 2  # tables begin at multiples of 16 bytes
        if not inside:
            return _put(self._fixed, self._addresses, [*addresses, *[0] * padding], len(addresses))
        if len(inside) < len(found):
            raise NotRecordableError("a table has addresses of gradients and others")
        return _put(self._moving, self._places, [*inside, *[(0, 0)] * padding], len(addresses))

    def _in_gradients(self, address: int) -> tuple[int, int] | None:
        at = bisect_right(self._spans, (address, float("inf"), 0)) - 1
        if at < 0:
            return None
        start, size, index = self._spans[at]
        return (index, address - start) if address < start + size else None

    def settle(self) -> None:
        """Write, after a capture, what does not change between steps."""
        _write(self._fixed, self._addresses)
        self._tables.clear()

    def update(self, works: Sequence[Work], places: Sequence[int]) -> None:
        """Write what changes in every step: clocks, and the ``places`` of gradients."""
        rest = [0.0] * (2 * _WIDTH - len(Clock._fields))
        clocks = array("f", chain.from_iterable((*timed.clock(works), *rest) for timed in self._clocked)).tobytes()
        moving = array("q", [places[index] + distance for index, distance in self._places])
        written = torch.frombuffer(bytearray(clocks.ljust(self._clocks.nbytes, b"\0")) + moving, dtype=torch.int64)
        if self.device.type == "cuda":
            written = written.pin_memory()
        self._changing[: len(written)].copy_(written, non_blocking=True)


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last one."""
    distances = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + sum(distances)) * tensor.element_size()


def _put(table: Tensor, held: list[Any], added: Sequence[Any], count: int) -> Tensor:
    """Append what is ``added`` to what a ``table`` will have, and return the place of its first ``count`` entries."""
    start = len(held)
    held += added
    if len(held) > len(table):
        raise NotRecordableError("there are more tables than expected")
    return table[start : start + count]


def _write(table: Tensor, values: Sequence[float]) -> None:
    """Begin to copy values to the front of a ``table``; the host need not keep them."""
    table[: len(values)].copy_(pinned(values, table.dtype, table.device), non_blocking=True)


class Recording:
    """A step that can be replayed.

    Args:
        works: The step.
        launch: Launches it, given a function that gives a clock for parts, and returns what was found.
        cache: What is kept on the device.
        pool: Memory for its temporaries.
    """

    def __init__(
        self,
        works: Sequence[Work],
        launch: Callable[[Clocks], Sequence[Found]],
        cache: DeviceCache,
        pool: Pool,
    ) -> None:
        self._static = StaticTensors(cache, works)
        self._parts = [part for work in works for parts in work.parts for part in parts]
        self._flaws = torch.zeros(len(self._parts), dtype=torch.int32, device=self._static.device)
        self._squares: list[Tensor] = []
        """In the memory of the graph, which writes them anew."""
        order: list[Any] = []

        def run() -> None:
            found = launch(self._static.clock)
            order.extend(part.key for each in found for part in each.parts)
            self._squares.extend(squares for each in found for squares in each.squares)
            torch.cat([each.flaws for each in found], out=self._flaws)

        with using(self._static):
            self._graph: Graph = pool.captured(run, self._static.device)
        self._static.settle()
        place = {key: index for index, key in enumerate(order)}
        self._order = torch.empty(len(self._parts), dtype=torch.int64, device=self._static.device)
        _write(self._order, [place[part.key] for part in self._parts])

    @property
    def nbytes(self) -> int:
        """Bytes of tables and clocks on the device, without the temporaries of the step."""
        return self._static.nbytes + self._flaws.nbytes + self._order.nbytes

    def play(self, works: Sequence[Work], places: Sequence[int]) -> list[Found]:
        """Replay the step for gradients at these ``places``."""
        self._static.update(works, places)
        self._graph.replay()
        torch.autograd.graph.increment_version([held for work in works for held in work.held])
        return [Found(self._parts, self._flaws[self._order], self._squares)]
