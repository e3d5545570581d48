"""Sums over the rows of sharded matrices."""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.sharding.collectives import Pending, Planned, all_reduce, begin_and_wait, gathering, total
from lightning_adapm.sharding.rows import RowShard, column_range

Tensors: TypeAlias = Sequence[Tensor] | Tensor
"""One tensor per matrix or stack, or all of them in one, whose first dimension counts them."""
_Tensors = TypeVar("_Tensors", bound=Tensors)


def each(operation: Callable[..., Tensor], *values: Tensors) -> Tensors:
    """Results of an operation on the tensors of each matrix, by one call where all of them are in one tensor."""
    if all(isinstance(value, Tensor) for value in values):
        return operation(*values)
    return [operation(*tensors) for tensors in zip(*values, strict=True)]


class Reduction:
    """Completes sums over rows with those of other processes; in this base class there are none.

    Arguments are one tensor per matrix, or one batch for several matrices. They are changed in place and returned.
    """

    def rows(self, values: _Tensors) -> _Tensors:
        """Complete per-row sums ``(k, c)`` over columns with the other processes' parts of the same rows."""
        return values

    def total(self, values: _Tensors) -> _Tensors:
        """Complete sums over this process's rows with those of the other processes."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Largest absolute value of ``(b, k, c)`` over all rows, of shape ``(b, 1, c)``."""
        return torch.linalg.vector_norm(values, torch.inf, dim=-2, keepdim=True)

    def length(self, values: Tensor) -> Tensor:
        """Euclidean length of the columns of ``(b, k, c)``, of shape ``(b, 1, c)``, in float64 against overflow."""
        return torch.linalg.vector_norm(values, dim=-2, keepdim=True, dtype=torch.float64)

    def any(self, flags: Tensor) -> Tensor:
        """Whether each flag is set on any process."""
        return flags

    @property
    def scope(self) -> Hashable:
        """A key, equal for reductions that may complete each other's sums."""
        return None

    def columns(self, values: Tensor, n: int) -> Tensor:
        """Gather all columns ``(b, r, n)`` of a tensor whose columns processes may share, by :func:`column_range`."""
        return self.columns_of([values], [n])[0]

    def columns_of(self, stacks: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
        """Gather :meth:`columns` of several stacks in one collective; ``widths`` are their numbers of columns."""
        planned, gathered = self.gather_columns(stacks, widths)
        if planned:
            begin_and_wait(pending := Pending(planned), pending)
        return gathered()

    def gather_columns(
        self, stacks: Sequence[Tensor], widths: Sequence[int]
    ) -> tuple[list[Planned], Callable[[], list[Tensor]]]:
        """Plan :meth:`columns_of`; return the collectives, and a function that returns the columns after them."""
        return [], lambda: list(stacks)

    def kept_columns(self, values: Tensor) -> Tensor:
        """Select the columns that this process keeps; the inverse of :meth:`columns`."""
        return values

    def over_columns(self, values: Tensor) -> Tensor:
        """Complete sums over the columns that this process keeps with those of the other processes."""
        return values

    def owned(self, values: Tensor) -> Tensor:
        """Zero the rows of ``(b, k, c)`` that begin on another process, so that a sum counts every row once."""
        return values

    def sizes(self, values: Sequence[Tensor]) -> list[int]:
        """Number of rows of each matrix over all processes; number of elements of anything else."""
        return [value.shape[-2] if value.dim() > 1 else value.numel() for value in values]

    def means(self, values: Tensors) -> Tensors:
        """Means of row values ``(k, 1)`` over all rows, of shape ``(1, 1)``."""
        return each(lambda value: value.mean(dim=-2, keepdim=True), values)

    def block_means(self, means: Tensors, blocks: int) -> Tensors:
        """Average row means ``(k, 1)`` over equal blocks of rows, to ``(blocks, 1)``."""
        return each(lambda mean: mean.unflatten(-2, (blocks, -1)).mean(dim=-2), means)

    def of_rows(self, values: Tensors, blocks: int, like: Sequence[Tensor]) -> Tensors:
        """Repeat the values of blocks of rows for each row."""
        rows = like[0].shape[-2] // blocks
        return each(lambda value: value.repeat_interleave(rows, dim=-2), values)


ONE_PROCESS = Reduction()


class ProcessReduction(Reduction):
    """Completes sums over the rows that a group of processes holds, with one collective for a whole batch.

    Args:
        shards: Shards of the batch's matrices, in order; all of one group.
        columns_shared: Whether each process keeps only some columns of what :meth:`columns` gathers.
    """

    def __init__(self, shards: Sequence[RowShard], columns_shared: bool = False) -> None:
        self.shards = shards
        self._columns_shared = columns_shared
        self.group = shards[0].layout.group
        """The processes."""

    def rows(self, values: _Tensors) -> _Tensors:
        cut = sum(len(shard.cut) for shard in self.shards)
        if cut == 0:
            return values
        parts = values[0].new_zeros(cut, values[0].shape[-1])
        mine, place = [], 0
        for shard, value in zip(self.shards, values, strict=True):
            for row in shard.cut:
                if shard.first <= row < shard.first + shard.count:
                    mine.append((place, value[row - shard.first]))
                place += 1
        for place, row_value in mine:
            parts[place] = row_value
        all_reduce(parts, self.group)
        for place, row_value in mine:
            row_value.copy_(parts[place])
        return values

    def total(self, values: _Tensors) -> _Tensors:
        total([values] if isinstance(values, Tensor) else list(values), self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        found = super().largest(values) if values.shape[-2] else values.new_zeros(values.shape[0], 1, values.shape[-1])
        all_reduce(found, self.group, dist.ReduceOp.MAX)
        return found

    def length(self, values: Tensor) -> Tensor:
        (squares,) = self.total([super().length(self.owned(values)).square_()])
        return squares.sqrt_()

    def any(self, flags: Tensor) -> Tensor:
        counts = flags.to(torch.int32)
        all_reduce(counts, self.group, dist.ReduceOp.MAX)
        return counts != 0

    def kept_columns(self, values: Tensor) -> Tensor:
        if not self._columns_shared:
            return values
        return values[..., slice(*column_range(self.shards[0].layout, values.shape[-1]))]

    @property
    def scope(self) -> Hashable:
        return self.group, self._columns_shared

    def gather_columns(
        self, stacks: Sequence[Tensor], widths: Sequence[int]
    ) -> tuple[list[Planned], Callable[[], list[Tensor]]]:
        if not self._columns_shared:
            return super().gather_columns(stacks, widths)
        count = len(self.shards[0].layout.spans)
        missing = [-(-n // count) - stack.shape[-1] for stack, n in zip(stacks, widths, strict=True)]
        parts = [pad(stack, (0, more)) if more else stack for stack, more in zip(stacks, missing, strict=True)]
        sent = [parts[0].flatten() if len(parts) == 1 else torch.cat([part.flatten() for part in parts])]
        whole = sent[0].new_empty(count * sent[0].numel())
        planned = [gathering(whole, sent[0], self.group)]

        def gathered() -> list[Tensor]:
            sent.clear()  # its memory was not to be used again before
            pieces = whole.view(count, -1).split([part.numel() for part in parts], dim=1)
            found = (
                torch.cat([each.view(part.shape) for each in piece.unbind()], dim=-1)
                for piece, part in zip(pieces, parts, strict=True)
            )
            return [
                each[..., :n].contiguous().to(stack.dtype) for each, n, stack in zip(found, widths, stacks, strict=True)
            ]

        return planned, gathered

    def over_columns(self, values: Tensor) -> Tensor:
        return self.total([values])[0] if self._columns_shared else values

    def owned(self, values: Tensor) -> Tensor:
        others = [index for index, shard in enumerate(self.shards) if shard.count and not shard.owns_first]
        if not others:
            return values
        values = values.clone()
        values[others, 0] = 0.0
        return values

    def sizes(self, values: Sequence[Tensor]) -> list[int]:
        return [shard.size for shard in self.shards]

    def means(self, values: Tensors) -> Tensors:
        sums = self.total([value.sum(dim=-2, keepdim=True) for value in self._each_row_once(values)])
        return list(torch._foreach_div(sums, [float(shard.size) for shard in self.shards]))

    def block_means(self, means: Tensors, blocks: int) -> Tensors:
        sums, places = means[0].new_zeros(len(means), blocks, 1), self._blocks(blocks, means[0].device)
        for into, place, mean in zip(sums, places, self._each_row_once(means), strict=True):
            into.index_add_(0, place, mean)
        self.total([sums])
        return list((sums / (self.shards[0].size // blocks)).unbind())

    def of_rows(self, values: Tensors, blocks: int, like: Sequence[Tensor]) -> Tensors:
        places = self._blocks(blocks, values[0].device)
        return [value[place] for value, place in zip(values, places, strict=True)]

    def _each_row_once(self, values: Tensors) -> list[Tensor]:
        return [
            value if shard.owns_first or not shard.count else torch.cat([torch.zeros_like(value[:1]), value[1:]])
            for shard, value in zip(self.shards, values, strict=True)
        ]

    def _blocks(self, blocks: int, device: torch.device) -> list[Tensor]:
        """Block of every row held by this process, for each matrix; under FSDP2 all of them have the same."""
        found: dict[tuple[int, int], Tensor] = {}
        for shard in self.shards:
            if (shard.first, shard.count) not in found:
                rows = torch.arange(shard.first, shard.first + shard.count, device=device)
                found[shard.first, shard.count] = rows // (shard.size // blocks)
        return [found[shard.first, shard.count] for shard in self.shards]
