"""View of a step for an observer, in tiles of a bounded size; the step itself is unchanged."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_adapm.moments.base import Direction
from lightning_adapm.moments.tiles import spans
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.parts import Part


class Tiles:
    """A gradient in tiles of rows, in the dtype of the arithmetic; zero where it is not finite.

    Args:
        grad: The gradient of a part, as its matrix or stack of matrices.
        exact: Dtype of the arithmetic.
        flaw: Not 0 where the gradient counts as zero; None where that is done.
    """

    def __init__(self, grad: Tensor, exact: torch.dtype, flaw: Tensor | None = None) -> None:
        self.matrices = grad if grad.dim() == 3 else grad.reshape(1, *(grad.shape if grad.dim() == 2 else (1, -1)))
        self._exact, self._flaw = exact, flaw

    @property
    def shape(self) -> torch.Size:
        """Shape ``(b, m, n)`` of all matrices together."""
        return self.matrices.shape

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield tiles: the number of the matrix, the first row, and rows ``(k, n)``."""
        for which, matrix in enumerate(self.matrices):
            for first, last in spans(matrix):
                rows = matrix[first:last].to(self._exact)
                yield which, first, rows if self._flaw is None else torch.where(self._flaw == 0, rows, 0.0)


class Denominating(Protocol):
    """Denominators that are shown some rows at a time."""

    def rows(self, index: int, which: int, span: slice) -> Tensor:
        """Denominators of some rows of one of the matrices that the gradient with this ``index`` stacks."""
        ...


class Observer(Protocol):
    """Sees every part of a step; see :class:`lightning_adapm.report.diagnostics.ResidualProbe`.

    The tensors that it is shown belong to the step and must not be changed.
    """

    def see_gradient(self, part: Part, grad: Tiles) -> None:
        """Begin a part with its gradient, which the first moment has taken in."""
        ...

    def see_update(self, part: Part, direction: Tensor, update: Tensor, clip_threshold: float | None) -> None:
        """Show some rows of a part that has begun: the momentum used, and the normalized update before any clamp, in
        units of lr. Elements that other processes hold are zero.
        """
        ...


def see_gradients(observer: Observer, batch: Batch, flaws: Tensor | None = None) -> None:
    """Show the gradients of a batch, those with ``flaws`` ``(parts,)`` as zero."""
    for index, (part, grad) in enumerate(zip(batch.parts, batch.grads, strict=True)):
        observer.see_gradient(part, Tiles(grad, part.exact, None if flaws is None else flaws[index]))


def see_updates(
    observer: Observer,
    parts: Sequence[Part],
    momentum: Direction,
    used: Direction,
    denominators: Denominating,
    clip: float | None,
    first: int = 0,
    flaws: Tensor | None = None,
) -> None:
    """Show the updates of parts, computed again tile by tile.

    Args:
        observer: What sees them.
        parts: The parts.
        momentum: Their directions before the second moment has changed them.
        used: Their directions.
        denominators: What these are divided by.
        clip: Bound on the entries of updates.
        first: First row in what this process holds, where the tensors are some rows of a single part.
        flaws: Not 0 where a part's directions count as zero, ``(parts,)``.
    """
    place, same = 0, momentum.tensors is used.tensors and momentum.factors is used.factors
    for index, part in enumerate(parts):
        flaw, own = None if flaws is None else flaws[index], Tiles(used.tensors[index], part.exact)
        before = own.matrices if same else Tiles(momentum.tensors[index], part.exact).matrices
        for which, start, rows in own:
            span = slice(start, start + len(rows))
            rows = _multiplied(rows, used, flaw, place + which, span)
            direction = rows
            if not same:
                direction = _multiplied(before[which, span].to(part.exact), momentum, flaw, place + which, span)
            update = (rows / denominators.rows(index, which, span)).mul_(used.scale)
            direction = direction * momentum.scale
            if part.shard is not None:
                direction, update = (part.shard.held_only(each, first + start) for each in (direction, update))
            observer.see_update(part, direction, update, clip)
        place += len(own.matrices)


def _multiplied(rows: Tensor, direction: Direction, flaw: Tensor | None, place: int, span: slice) -> Tensor:
    """Rows of a direction, zero where there is a flaw, with the product of its factors."""
    rows = rows if flaw is None else torch.where(flaw == 0, rows, 0.0)
    if direction.factors is None:
        return rows
    left, right = direction.factors
    return torch.addmm(rows, left[place, span, : right.shape[-2]].to(rows.dtype), right[place].to(rows.dtype))
