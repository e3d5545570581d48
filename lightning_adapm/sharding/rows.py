"""The rows of a piece's matrix that this process holds.

Sharding leaves every process a contiguous range of a parameter's elements in row-major order. FSDP2 cuts between rows;
FSDP1 cuts anywhere. A process works on every row of which it holds an element, with zeros for the elements held by
others. Sums over processes are therefore right for whole rows and for cut ones.
"""

from functools import cached_property

import torch
from torch import Tensor

from lightning_adapm.sharding.layout import Layout


class RowShard:
    """The rows of one piece's matrix that this process holds, wholly or in part.

    A parameter has ``groups`` equal groups of rows, or of columns if ``transposed``. A piece is ``start`` to ``stop``
    of each group; see :class:`lightning_adapm.roles.piece.Piece`. Vectors have rows of one element.

    Args:
        layout: Layout of the parameter.
        start: First row or column of the piece in each group.
        stop: The row or column after the last; None for the whole parameter.
        groups: Number of equal groups of rows or columns.
        transposed: Whether the piece consists of columns.
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
        """Number of columns of the matrix."""
        self.size = self._rows_before(rows)
        """Number of rows of the matrix over all processes."""
        first, last = layout.held
        self.first = self._rows_before(first // self._width)
        """Index in the matrix of the first row held."""
        self.count = self._rows_before(-(-last // self._width)) - self.first if last > first else 0
        """Number of rows held, including those held in part."""
        self.most = max(self.counts)
        """Number of rows held by the process that holds most."""

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Number of rows that each process holds."""
        return tuple(map(self._count_of, self.layout.spans))

    @property
    def interleaved(self) -> bool:
        """Whether the piece's columns lie in several groups, with those of other pieces between them."""
        return self._columns is not None and self._columns[2] > 1

    def rows_of(self, rank: int) -> tuple[int, int]:
        """The first row that a process holds, and how many; see :attr:`first` and :attr:`count`."""
        span = self.layout.spans[rank]
        return self._rows_before(span[0] // self._width), self._count_of(span)

    def _count_of(self, span: tuple[int, int]) -> int:
        first, last = span
        if last <= first:
            return 0
        return self._rows_before(-(-last // self._width)) - self._rows_before(first // self._width)

    def _rows_before(self, row: int) -> int:
        """Number of the parameter's rows before ``row`` that belong to the piece."""
        length, into = self._stop - self._start, row % self._period - self._start if self._period else 0
        return row // max(1, self._period) * length + min(max(into, 0), length)

    @cached_property
    def cut(self) -> tuple[int, ...]:
        """Rows of the matrix that are cut between processes, in order."""
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
        """Runs of local elements that belong to the piece: first, the one after the last, place in the piece's rows."""
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
        """Number of the piece's elements that this process holds."""
        if self._columns is None:
            return sum(high - low for low, high, _ in self._runs)
        first, last = self.layout.held
        return int(self.held_only(torch.ones(self.count, self.width, device="cpu")).sum()) if last > first else 0

    def held_only(self, rows: Tensor, start: int = 0) -> Tensor:
        """Zero the elements of ``rows`` that other processes hold; ``rows`` begin with row ``start`` of those held."""
        first, last = self.layout.held
        if not (first % self._width or last % self._width) or (start > 0 and start + len(rows) < self.count):
            return rows  # only the first and the last row that are held can be cut
        mine = self.take(torch.ones(last - first, dtype=torch.bool, device=rows.device))
        return torch.where(mine.flatten(1)[start : start + len(rows)].reshape(rows.shape), rows, 0.0)

    def take(self, part: Tensor) -> Tensor:
        """Take the rows ``(count, n)`` out of a local part, with zeros where others hold them; a view if possible."""
        rows = self._rows(part.reshape(-1))
        return self._own_columns(rows) if len(self.layout.shape) > 1 else rows.flatten()

    def put(self, part: Tensor, rows: Tensor) -> None:
        """Write rows back that were taken and then changed; does nothing to a view."""
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
    """First column that this process keeps of ``n``, and the one after its last."""
    size = -(-n // len(layout.spans))
    return min(size * layout.rank, n), min(size * (layout.rank + 1), n)
