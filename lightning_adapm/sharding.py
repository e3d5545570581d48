"""What part of a piece's matrix this process holds, and how to sum over the rest.

Sharding leaves every process a contiguous range of a parameter's elements, in row-major order: whole rows under FSDP2,
a range that begins and ends anywhere under FSDP1. A process works on the rows that it holds something of; where a row
is cut, what others hold of it is zero here, so that sums over processes are sums over rows and over cut rows.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.layout import Layout

_Tensors = TypeVar("_Tensors", bound=Sequence[Tensor] | Tensor)


class RowShard:
    """The rows of one piece's matrix that this process holds, wholly or in part.

    A piece is the rows (or, ``transposed``, the columns) ``start`` to ``stop`` of each of ``groups`` equal groups of a
    parameter's, as :class:`lightning_adapm.roles.Piece` says it. Parameters that are not matrices have rows of one.

    Args:
        layout: of the parameter.
        start: of the piece in each group.
        stop: of the piece in each group; None for the whole parameter.
        groups: equal groups of rows or columns.
        transposed: the piece is columns.
    """

    def __init__(
        self, layout: Layout, start: int = 0, stop: int | None = None, groups: int = 1, transposed: bool = False
    ) -> None:
        self.layout = layout
        shape = layout.shape
        self._width = shape[1:].numel() if len(shape) > 1 else 1
        rows = shape[0] if len(shape) else 1
        self._columns = (start, stop, groups) if transposed and stop is not None else None
        whole = stop is None or transposed
        self._start, self._stop, self._groups = (0, rows, 1) if whole else (start, int(stop or 0), groups)
        self._period = rows // self._groups
        self.width = (int(stop or 0) - start) * groups if self._columns else self._width
        """Columns of the matrix."""
        self.size = self._rows_before(rows)
        """Rows of the matrix, over all processes."""
        first, last = layout.held
        self.first = self._rows_before(first // self._width)
        """The first row held, counted in the matrix."""
        self.count = self._rows_before(-(-last // self._width)) - self.first if last > first else 0
        """Rows held, those included that are held in part."""
        self.most = max(self._count_of(span) for span in layout.spans)
        """Rows held by the process that holds most."""

    def _count_of(self, span: tuple[int, int]) -> int:
        first, last = span
        if last <= first:
            return 0
        return self._rows_before(-(-last // self._width)) - self._rows_before(first // self._width)

    def _rows_before(self, row: int) -> int:
        """How many of the parameter's rows before ``row`` are the piece's."""
        length, into = self._stop - self._start, row % self._period - self._start if self._period else 0
        return row // max(1, self._period) * length + min(max(into, 0), length)

    @cached_property
    def cut(self) -> tuple[int, ...]:
        """Rows of the matrix that several processes hold a part of, in order."""
        rows = {last // self._width for first, last in self.layout.spans if last > first and last % self._width}
        inside = (row for row in sorted(rows) if self._start <= row % self._period < self._stop)
        return tuple(self._rows_before(row) for row in inside)

    @cached_property
    def owns_first(self) -> bool:
        """Whether the first row held begins on this process."""
        row, cut = divmod(self.layout.held[0], self._width)
        return not (cut and self._start <= row % self._period < self._stop)

    @cached_property
    def _runs(self) -> list[tuple[int, int, int]]:
        """Elements of the local part that belong to the piece, and where in its rows: from, to, at."""
        first, last = self.layout.held
        runs = []
        for group in range(first // self._width // max(1, self._period), self._groups):
            begin = (group * self._period + self._start) * self._width
            end = (group * self._period + self._stop) * self._width
            if begin >= last:
                break
            low, high = max(begin, first), min(end, last)
            if low < high:
                at = (self._rows_before(low // self._width) - self.first) * self._width + low % self._width
                runs.append((low - first, high - first, at))
        return runs

    @cached_property
    def numel(self) -> int:
        """Elements of the piece that this process holds."""
        if self._columns is None:
            return sum(high - low for low, high, _ in self._runs)
        first, last = self.layout.held
        return int(self.held_only(torch.ones(self.count, self.width)).sum()) if last > first else 0

    def held_only(self, rows: Tensor) -> Tensor:
        """Rows with zero where other processes hold them."""
        if not (self.layout.held[0] % self._width or self.layout.held[1] % self._width):
            return rows
        first, last = self.layout.held
        mine = self.take(torch.ones(last - first, dtype=torch.bool, device=rows.device))
        return torch.where(mine.reshape(rows.shape), rows, 0.0)

    def take(self, part: Tensor) -> Tensor:
        """The rows of a local part ``(count, n)``, zero where others hold them; a view where that is possible."""
        rows = self._rows(part.reshape(-1))
        return self._own_columns(rows) if len(self.layout.shape) > 1 else rows.flatten()

    def put(self, part: Tensor, rows: Tensor) -> None:
        """Write back rows that were taken and changed."""
        flat = part.view(-1)
        if self._is_view:
            return
        if self._columns is not None:  # other pieces have changed the other columns since
            all_columns = self._rows(flat)
            self._own_columns(all_columns).copy_(rows)
            rows = all_columns
        for low, high, at in self._runs:
            flat[low:high] = rows.reshape(-1)[at : at + high - low]

    @property
    def _is_view(self) -> bool:
        return len(self._runs) == 1 and self._runs[0][1] - self._runs[0][0] == self.count * self._width

    def _rows(self, flat: Tensor) -> Tensor:
        if self._is_view:
            low, high, _ = self._runs[0]
            return flat[low:high].view(self.count, self._width)
        rows = flat.new_zeros(self.count * self._width)
        for low, high, at in self._runs:
            rows[at : at + high - low] = flat[low:high]
        return rows.view(self.count, self._width)

    def _own_columns(self, rows: Tensor) -> Tensor:
        if self._columns is None:
            return rows
        start, stop, groups = self._columns
        if groups == 1:
            return rows[:, start:stop]
        return rows.unflatten(1, (groups, -1))[:, :, start:stop]


def column_range(layout: Layout, n: int) -> tuple[int, int]:
    """Of ``n`` columns, those that this process keeps: the first, and the one after the last."""
    size = -(-n // len(layout.spans))
    return min(size * layout.rank, n), min(size * (layout.rank + 1), n)


class Traffic:
    """What a process has given to collectives or got from gathering ones, in bytes, and how many there were."""

    def __init__(self) -> None:
        self.bytes = self.collectives = 0

    def add(self, tensor: Tensor) -> None:
        """Count one collective."""
        self.bytes += tensor.numel() * tensor.element_size()
        self.collectives += 1


TRAFFIC = Traffic()
"""Of the steps of all optimizers in this process."""


def all_reduce(tensor: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Counted in :data:`TRAFFIC`."""
    TRAFFIC.add(tensor)
    dist.all_reduce(tensor, op, group=group)


def gradients(params: Sequence[Tensor], layouts: Sequence[Layout | None]) -> list[Tensor | None]:
    """The gradient of every parameter, zero or empty where only other processes have one.

    Only FSDP1 needs asking them: where it keeps nothing of a parameter, it keeps no gradient.
    """
    found = [param.grad for param in params]
    by_group: dict[dist.ProcessGroup, list[int]] = {}
    for index, layout in enumerate(layouts):
        if layout is not None and layout.mesh is None:
            by_group.setdefault(layout.group, []).append(index)
    for group, indices in by_group.items():
        there = torch.tensor([found[index] is not None for index in indices], dtype=torch.int32)
        there = there.to(params[indices[0]].device)
        all_reduce(there, group, dist.ReduceOp.MAX)
        for index, exists in zip(indices, there.tolist(), strict=True):
            if exists and found[index] is None:
                found[index] = torch.zeros_like(params[index])
    return found


def total(values: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Sums over processes of tensors of one dtype, in place, by one collective."""
    flat = torch.cat([value.flatten() for value in values])
    all_reduce(flat, group)
    for value, summed in zip(values, flat.split([value.numel() for value in values]), strict=True):
        value.copy_(summed.view(value.shape))
    return values


class Reduction:
    """Completes sums over rows. This one is for matrices that one process holds: there is nothing to add.

    Values are per matrix, or of several matrices as one batch; all are changed in place and given back.
    """

    def rows(self, values: _Tensors) -> _Tensors:
        """Per-row sums ``(k, c)`` over columns: add what other processes hold of the same rows."""
        return values

    def total(self, values: list[Tensor]) -> list[Tensor]:
        """Sums over the rows of this process: add those of the other processes."""
        return values

    def largest(self, values: Tensor) -> Tensor:
        """Largest absolute value of ``(b, k, c)`` over all rows, ``(b, 1, c)``."""
        return values.abs().amax(dim=-2, keepdim=True)

    def length(self, values: Tensor) -> Tensor:
        """Euclidean length of the columns of ``(b, k, c)``, ``(b, 1, c)``, in float64: it may be beyond float32."""
        return torch.linalg.vector_norm(values, dim=-2, keepdim=True, dtype=torch.float64)

    def any(self, flags: Tensor) -> Tensor:
        """Whether a flag is set on any process."""
        return flags

    def columns(self, values: Tensor, n: int) -> Tensor:
        """All columns ``(b, r, n)`` of matrices whose columns the processes share out by :func:`column_range`."""
        return values

    def owned(self, values: Tensor) -> Tensor:
        """``(b, k, c)`` with zero in the rows that begin on another process: each row once over all processes."""
        return values

    def sizes(self, values: Sequence[Tensor]) -> list[int]:
        """Rows of each matrix, over all processes; elements of what is not a matrix."""
        return [value.shape[-2] if value.dim() > 1 else value.numel() for value in values]

    def means(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Means of row values ``(k, 1)`` over all rows, ``(1, 1)``."""
        return [value.mean(dim=-2, keepdim=True) for value in values]

    def block_means(self, means: Sequence[Tensor], blocks: int) -> list[Tensor]:
        """Row means ``(k, 1)`` as the means of equal blocks of rows ``(blocks, 1)``."""
        return list(torch.stack(list(means)).unflatten(-2, (blocks, -1)).mean(dim=-2).unbind())

    def of_rows(self, values: Sequence[Tensor], blocks: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Values of blocks of rows as values of rows."""
        rows = like[0].shape[-2] // blocks
        return list(torch.stack(list(values)).repeat_interleave(rows, dim=-2).unbind())


ONE_PROCESS = Reduction()


class ProcessReduction(Reduction):
    """Completes sums over the rows that the processes of a group hold, with one collective for the whole batch.

    Args:
        shards: of the matrices of the batch, in order; all of one group.
    """

    def __init__(self, shards: Sequence[RowShard]) -> None:
        self._shards = shards
        self._group = shards[0].layout.group

    def rows(self, values: _Tensors) -> _Tensors:
        cut = sum(len(shard.cut) for shard in self._shards)
        if cut == 0:
            return values
        parts = values[0].new_zeros(cut, values[0].shape[-1])
        mine, place = [], 0
        for shard, value in zip(self._shards, values, strict=True):
            for row in shard.cut:
                if shard.first <= row < shard.first + shard.count:
                    mine.append((place, value[row - shard.first]))
                place += 1
        for place, row_value in mine:
            parts[place] = row_value
        all_reduce(parts, self._group)
        for place, row_value in mine:
            row_value.copy_(parts[place])
        return values

    def total(self, values: list[Tensor]) -> list[Tensor]:
        return total(values, self._group)

    def largest(self, values: Tensor) -> Tensor:
        found = super().largest(values) if values.shape[-2] else values.new_zeros(values.shape[0], 1, values.shape[-1])
        all_reduce(found, self._group, dist.ReduceOp.MAX)
        return found

    def length(self, values: Tensor) -> Tensor:
        (squares,) = self.total([super().length(self.owned(values)).square_()])
        return squares.sqrt_()

    def any(self, flags: Tensor) -> Tensor:
        counts = flags.to(torch.int32)
        all_reduce(counts, self._group, dist.ReduceOp.MAX)
        return counts != 0

    def columns(self, values: Tensor, n: int) -> Tensor:
        count = len(self._shards[0].layout.spans)
        part = pad(values, (0, -(-n // count) - values.shape[-1]))
        parts = part.new_empty(count * part.numel())
        TRAFFIC.add(parts)
        dist.all_gather_into_tensor(parts, part.flatten(), group=self._group)
        return torch.cat(parts.view(count, *part.shape).unbind(), dim=-1)[..., :n]

    def owned(self, values: Tensor) -> Tensor:
        others = [index for index, shard in enumerate(self._shards) if shard.count and not shard.owns_first]
        if not others:
            return values
        values = values.clone()
        values[others, 0] = 0.0
        return values

    def sizes(self, values: Sequence[Tensor]) -> list[int]:
        return [shard.size for shard in self._shards]

    def means(self, values: Sequence[Tensor]) -> list[Tensor]:
        sums = self.total([value.sum(dim=-2, keepdim=True) for value in self._each_row_once(values)])
        return [total / shard.size for shard, total in zip(self._shards, sums, strict=True)]

    def block_means(self, means: Sequence[Tensor], blocks: int) -> list[Tensor]:
        sums = []
        for shard, mean in zip(self._shards, self._each_row_once(means), strict=True):
            into = mean.new_zeros(blocks, 1)
            sums.append(into.index_add_(0, self._blocks(shard, blocks, mean.device), mean))
        totals = self.total(sums)
        return [total / (shard.size // blocks) for shard, total in zip(self._shards, totals, strict=True)]

    def of_rows(self, values: Sequence[Tensor], blocks: int, like: Sequence[Tensor]) -> list[Tensor]:
        return [
            value[self._blocks(shard, blocks, value.device)] for shard, value in zip(self._shards, values, strict=True)
        ]

    def _each_row_once(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [
            value if shard.owns_first or not shard.count else torch.cat([torch.zeros_like(value[:1]), value[1:]])
            for shard, value in zip(self._shards, values, strict=True)
        ]

    @staticmethod
    def _blocks(shard: RowShard, blocks: int, device: torch.device) -> Tensor:
        """The block of every row held."""
        return torch.arange(shard.first, shard.first + shard.count, device=device) // (shard.size // blocks)
