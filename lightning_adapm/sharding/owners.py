"""Whole matrices from sharded rows: each matrix goes to one process, which works on it alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_adapm.sharding.collectives import all_to_all
from lightning_adapm.sharding.rows import RowShard


class Owners:
    """Assignment of a batch's matrices to the processes that hold their rows, with one exchange in each direction.

    Each of ``N`` processes sends its rows of every matrix and receives one matrix in ``N``. Its traffic shrinks with
    ``N`` like its share of the rows, and no work is done twice.

    Args:
        shards: Shards of the batch's matrices, in order; all of one group and one shape.
    """

    def __init__(self, shards: Sequence[RowShard]) -> None:
        layout = shards[0].layout
        self._shards, self._group, self._rank = shards, layout.group, layout.rank
        count = len(layout.spans)
        self._dealt = [range(owner, len(shards), count) for owner in range(count)]
        """Indices of each process's matrices."""

    def apply(self, function: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """Apply a function to whole matrices, and return this process's rows of each result.

        Args:
            function: Function of a tensor ``(b, m, n)`` to one of the same shape, of any dtype.
            parts: This process's rows of each matrix, zero where others hold them.
        """
        mine, shards = self._dealt[self._rank], self._shards
        given = [sum(shards[i].count for i in dealt) for dealt in self._dealt]
        taken = [sum(shards[i].rows_of(rank)[1] for i in mine) for rank in range(len(self._dealt))]
        order = [i for dealt in self._dealt for i in dealt]
        results = function(self._whole(self._exchanged(torch.cat([parts[i] for i in order]), given, taken)))
        rows = [
            result[first : first + count]
            for rank in range(len(self._dealt))
            for result, (first, count) in zip(results, (shards[i].rows_of(rank) for i in mine), strict=True)
        ]
        back = torch.cat(rows) if rows else results.flatten(0, 1)
        found = self._exchanged(back, taken, given).split([shards[i].count for i in order])
        return [result for _, result in sorted(zip(order, found, strict=True), key=lambda pair: pair[0])]

    def _exchanged(self, rows: Tensor, given: list[int], taken: list[int]) -> Tensor:
        """Exchange rows: send ``given`` to each process, and receive as many."""
        received = rows.new_empty(sum(taken), rows.shape[1])
        all_to_all(received, rows.contiguous(), taken, given, self._group)
        return received

    def _whole(self, received: Tensor) -> Tensor:
        """Assemble this process's matrices from the rows of all processes."""
        mine, like = self._dealt[self._rank], self._shards[0]
        whole, place = received.new_zeros(len(mine), like.size, like.width), 0
        for rank in range(len(self._dealt)):
            for matrix, i in zip(whole, mine, strict=True):
                first, count = self._shards[i].rows_of(rank)
                matrix[first : first + count] += received[place : place + count]  # a row may be cut in two
                place += count
        return whole
