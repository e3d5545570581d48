"""Whole matrices from sharded rows: each matrix goes to one process, which works on it alone."""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.sharding.collectives import Pending, Planned, begin_and_wait, exchanging
from lightning_adapm.sharding.rows import RowShard

LARGE = 1 << 24
"""Bytes of a matrix above which it has an exchange of its own, which writes its rows to their final places. Smaller
matrices share an exchange, because launching one takes the host as long as copying their rows takes the device.
"""


class Exchange(NamedTuple):
    """Matrices that are exchanged together."""

    dealt: list[range]
    """Indices of the matrices that each process works on."""
    place: slice
    """Positions of this process's matrices among all that it works on."""

    @property
    def all(self) -> slice:
        """Indices of all matrices of the exchange."""
        return slice(self.dealt[0].start, self.dealt[-1].stop)


class Owners:
    """Assignment of a batch's matrices to the processes that hold their rows, with one exchange in each direction.

    Each of ``N`` processes sends its rows of every matrix and receives one matrix of every ``N``. Its traffic shrinks
    with ``N``, as its share of the rows does, and no work is done twice. The device continues during an exchange.

    Args:
        shards: Shards of the batch's matrices, in order; all of one group and one shape.
        dtype: Dtype of what is exchanged.
    """

    def __init__(self, shards: Sequence[RowShard], dtype: torch.dtype) -> None:
        layout = shards[0].layout
        self._shards, self._group, self._rank = shards, layout.group, layout.rank
        self._processes = range(len(layout.spans))
        self._size, self._width = shards[0].size, shards[0].width
        self._cut = any(shard.cut for shard in shards)
        alike = not self._cut and len({shard.counts for shard in shards}) == 1
        large = self._size * self._width * dtype.itemsize >= LARGE
        self._together = len(self._processes) if alike and large else len(shards)

    @cached_property
    def _exchanges(self) -> list[Exchange]:
        found, mine = list[Exchange](), 0
        for start in range(0, len(self._shards), self._together):
            number = min(self._together, len(self._shards) - start)
            each, more = divmod(number, len(self._processes))
            edges = accumulate((each + (process < more) for process in self._processes), initial=start)
            dealt = [range(*pair) for pair in pairwise(edges)]
            found.append(Exchange(dealt, slice(mine, mine + len(dealt[self._rank]))))
            mine += len(dealt[self._rank])
        return found

    def apply(self, function: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """Apply a function to whole matrices, and return this process's rows of each result.

        Args:
            function: Function of a tensor ``(b, m, n)`` to one of the same shape, of any dtype.
            parts: This process's rows of each matrix, zero where others hold them.
        """
        planned, collected = self.collect(parts)
        begin_and_wait(pending := Pending(planned), pending)
        planned, given_back = self.give_back(function(collected()))
        begin_and_wait(pending := Pending(planned), pending)
        return given_back()

    def mine(self, values: Tensor) -> Tensor:
        """Select the values of this process's matrices from one for each matrix."""
        own = [exchange.dealt[self._rank] for exchange in self._exchanges]
        return torch.cat([values[dealt.start : dealt.stop] for dealt in own])

    def collect(self, parts: Tensor | Sequence[Tensor]) -> tuple[list[Planned], Callable[[], Tensor]]:
        """Plan to collect this process's matrices from all rows of theirs.

        Args:
            parts: This process's rows of each matrix, which must stay as they are until all is done.

        Returns:
            The exchanges, and a function that returns the matrices ``(b, m, n)`` after them.
        """
        made = parts[0].new_zeros if self._cut else parts[0].new_empty
        whole = made(self._exchanges[-1].place.stop, self._size, self._width)
        planned, sent, received = list[Planned](), list[Tensor](), list[Tensor]()
        for exchange in self._exchanges:
            taken, given = self._received(exchange), self._sent(exchange)
            into = (
                whole[exchange.place].flatten(0, 1)
                if self._in_place(exchange)
                else whole.new_empty(sum(taken), self._width)
            )
            sent.append(self._joined(parts, exchange))
            received.append(into)
            planned.append(exchanging(into, sent[-1], taken, given, self._group))

        def collected() -> Tensor:
            sent.clear()  # their memory was not to be used again before
            for exchange, rows in zip(self._exchanges, received, strict=True):
                if not self._in_place(exchange):
                    self._assemble(whole[exchange.place], rows, exchange)
            return whole

        return planned, collected

    def give_back(
        self, results: Tensor, parts: Tensor | None = None
    ) -> tuple[list[Planned], Callable[[], list[Tensor]]]:
        """Plan to give the rows of results back to the processes that hold them.

        Args:
            results: A result for each of this process's matrices, ``(b, m, n)``.
            parts: Rows of each matrix ``(b, k, n)`` that the results may take the place of.

        Returns:
            The exchanges, and a function that returns this process's rows of each result after them.
        """
        planned, sent, received = list[Planned](), list[Tensor](), list[Tensor]()
        for exchange in self._exchanges:
            taken, given = self._sent(exchange), self._received(exchange)
            rows = (
                results[exchange.place].flatten(0, 1) if self._in_place(exchange) else self._cut_up(results, exchange)
            )
            into = results.new_empty(sum(taken), self._width) if parts is None else parts[exchange.all].flatten(0, 1)
            sent.append(rows.contiguous())
            received.append(into)
            planned.append(exchanging(into, sent[-1], taken, given, self._group))

        def given_back() -> list[Tensor]:
            sent.clear()  # their memory was not to be used again before
            counts = [[shard.count for shard in self._shards[exchange.all]] for exchange in self._exchanges]
            return [rows for into, each in zip(received, counts, strict=True) for rows in into.split(each)]

        return planned, given_back

    def _in_place(self, exchange: Exchange) -> bool:
        """Whether the rows of this process's matrices lie in memory in the order of the exchange."""
        return len(exchange.dealt[self._rank]) < 2 and not self._cut

    def _sent(self, exchange: Exchange) -> list[int]:
        """Number of this process's rows of each process's matrices."""
        return [sum(self._shards[i].count for i in dealt) for dealt in exchange.dealt]

    def _received(self, exchange: Exchange) -> list[int]:
        """Number of each process's rows of this process's matrices."""
        return [sum(count for _, count in self._spans(exchange, process)) for process in self._processes]

    def _spans(self, exchange: Exchange, process: int) -> list[tuple[int, int]]:
        """First row that a process has of each of this process's matrices, and how many."""
        return [self._shards[i].rows_of(process) for i in exchange.dealt[self._rank]]

    def _joined(self, parts: Tensor | Sequence[Tensor], exchange: Exchange) -> Tensor:
        """This process's rows of the matrices of an exchange; no copy of what lies together."""
        return parts[exchange.all].flatten(0, 1) if isinstance(parts, Tensor) else torch.cat(list(parts[exchange.all]))

    def _assemble(self, matrices: Tensor, received: Tensor, exchange: Exchange) -> None:
        """Assemble this process's matrices from the rows of all processes."""
        spans = [self._spans(exchange, process) for process in self._processes]
        pieces = received.split([count for each in spans for _, count in each])
        for index, matrix in enumerate(matrices):
            rows = pieces[index :: len(matrices)]
            if not self._cut:
                torch.cat(rows, out=matrix)
                continue
            for piece, (first, count) in zip(rows, (each[index] for each in spans), strict=True):
                matrix[first : first + count] += piece  # a row may be cut in two

    def _cut_up(self, results: Tensor, exchange: Exchange) -> Tensor:
        """Rows of this process's results in the order of the processes that hold them."""
        rows = [
            result[first : first + count]
            for process in self._processes
            for result, (first, count) in zip(results[exchange.place], self._spans(exchange, process), strict=True)
        ]
        return torch.cat(rows) if rows else results[exchange.place].flatten(0, 1)
