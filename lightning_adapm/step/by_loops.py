"""A step on a CPU by :mod:`lightning_adapm.step.loops`: torch's operations find factors and sums, loops do the rest.

Full momentum and elementwise second moments take gradients in where they move the parameters, in one pass over memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators, Direction, Momentum, SecondMoment, State
from lightning_adapm.moments.batches import join
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum
from lightning_adapm.moments.quantized import CODES, SCALE, EightBits, decoded_from
from lightning_adapm.moments.second import (
    ElementwiseSecondMoment,
    FactoredSecondMoment,
    bias_correction,
)
from lightning_adapm.moments.tiles import spans
from lightning_adapm.step import loops, watching
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.by_torch import Rows
from lightning_adapm.step.gradients import Gradients
from lightning_adapm.step.loops import Average, Reading
from lightning_adapm.step.parts import Part
from lightning_adapm.step.watching import Observer


def step(batch: Batch, group: Mapping[str, Any], observer: Observer | None) -> None:
    """Take gradients that are finite into the moments of a batch, and move its parameters."""
    parts, first, second = batch.parts, batch.parts[0].first, batch.parts[0].second
    direction = _direction(batch)
    beta2 = second.beta2 if isinstance(second, ElementwiseSecondMoment) else None
    known = None if beta2 is not None else second.denominators(batch.grads, parts, batch.step, batch.reduction)
    if observer is not None:
        watching.see_gradients(observer, batch)
    lr, clip = float(group["lr"]), group.get("clip_threshold")
    clip = None if clip is None or direction.clamp is None else float(clip * direction.clamp)
    for tile in _tiles(batch, direction, known, in_parts=observer is not None and isinstance(first, FullMomentum)):
        seen = None if observer is None else tile.taken
        loops.move(
            tile.params,
            tile.along.tensors,
            tile.denominators,
            rate=lr * direction.scale,
            keep=1 - lr * parts[0].decay,
            bound=None if clip is None else lr * clip,
            average=tile.average,
            factors=tile.along.factors,
            beta2=beta2,
        )
        if observer is not None and seen is not None:
            watching.see_updates(observer, tile.parts, seen, seen, tile.denominators, clip, tile.start)


def _direction(batch: Batch) -> Direction:
    """Take gradients into momentum, but for full momentum, which is taken further where it is used."""
    first, grads, parts = batch.parts[0].first, batch.grads, batch.parts
    if isinstance(first, FullMomentum):
        return Direction(grads, 1 / (1 - first.beta1**batch.step), scratch=False, clamp=None)
    if isinstance(first, LowRankMomentum) and isinstance(grads, ReadGradients) and first.storage.plain:
        lefts, factors = first.storage.read(parts, "exp_avg_l"), grads.factors
        if factors is not None and loops.advancing(lefts):
            loops.advance(factors[0], lefts, first.beta1, 1 - first.beta1**batch.step)
            return Direction(grads, 1.0, scratch=False, clamp=first.clamp, factors=factors)
        if first.due(batch.step) and all(part["seeded"] for part in parts):
            return _refreshed(batch, grads)
    return first.direction(grads, parts, batch.step, batch.reduction)


def _refreshed(batch: Batch, grads: "ReadGradients") -> Direction:
    """Refresh bases, of some parts in each thread: small products and factorizations are not worth several threads."""

    def some(span: slice) -> Direction:
        return batch.parts[0].first.direction(ReadGradients(grads[span], None, False), batch.parts[span], batch.step)

    found = loops.in_threads(len(grads), some)
    if len(found) == 1:
        return found[0]._replace(tensors=grads)
    factors = zip(*(direction.factors for direction in found if direction.factors is not None), strict=True)
    left, right = (torch.cat(tensors) for tensors in factors)
    return found[0]._replace(tensors=grads, factors=(left, right))


class ReadGradients(Gradients):
    """Gradients that loops read once: for sums of squares, and for products with the ``bases`` of a step.

    Args:
        grads: The gradients.
        bases: Bases ``(b, r, n)`` that they will be multiplied by, if they are known.
        columns: Sums of squares of columns will be asked for.
    """

    def __init__(self, grads: Iterable[Tensor], bases: Tensor | None, columns: bool) -> None:
        super().__init__(grads)
        self._bases, self._columns = bases, columns

    @cached_property
    def _reading(self) -> Reading:
        return loops.read(self._matrices, self._bases, self._columns)

    @property
    def finite(self) -> bool:
        return math.isfinite(float(self._reading.squares.sum()))

    def squares(self, dim: int | None) -> Tensor:
        rows, columns, _ = self._reading
        if dim is None:
            return rows.view(len(self), -1).sum(dim=1)
        assert dim == -1 or columns is not None
        sums = rows[..., None] if columns is None or dim == -1 else columns[:, None]
        return sums.view(len(self), *self[0].shape[:-2], *sums.shape[1:])

    @cached_property
    def _matrices(self) -> list[Tensor]:
        return [matrix for grad in self for matrix in (grad if grad.dim() == 3 else (grad,))]

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Their products with the transposed bases, and the bases; None if these are not known."""
        projected = self._reading.projected
        return None if projected is None or self._bases is None else (projected, self._bases)

    def __matmul__(self, columns: Tensor) -> Tensor:
        return loops.multiply(self._matrices, columns)

    def __rmatmul__(self, weights: Tensor) -> Tensor:
        return loops.multiply_left(self._matrices, weights)


def wrapped(batch: Batch) -> Callable[[Iterable[Tensor]], Gradients]:
    """How to wrap the gradients of a batch, whose moments determine what will be asked for."""
    first, second, bases = batch.parts[0].first, batch.parts[0].second, None
    if batch.parts[0].is_shared:  # shards may differ in shape
        return Gradients
    if isinstance(first, LowRankMomentum) and not first.due(batch.step) and all(part["seeded"] for part in batch.parts):
        kept = first.bases(batch.parts)
        bases = join(kept).float().contiguous()
    return partial(ReadGradients, bases=bases, columns=isinstance(second, FactoredSecondMoment))


class _Tile(NamedTuple):
    """Parts that loops move together, or some rows of a part, or matrices of a stack."""

    parts: list[Part]
    start: int
    """The first of the rows."""
    params: list[Tensor]
    along: Direction
    average: Average | None
    denominators: Denominators

    @property
    def taken(self) -> Direction:
        """The direction in which the rows are about to move: codes of small entries differ far more from these than
        an update should seem to.
        """
        if self.average is None:
            return self.along
        values, beta1, scales = self.average
        before = values if scales is None else list(map(decoded_from, values, scales))
        return self.along._replace(tensors=list(torch._foreach_lerp(before, self.along.tensors, 1 - beta1)))


def _tiles(batch: Batch, direction: Direction, known: Denominators | None, in_parts: bool) -> Iterator[_Tile]:
    """Cut a batch where parts hold different numbers of rows, and into tiles of a bounded size where a monitor is shown
    averages in advance.
    """
    parts, grads = batch.parts, batch.grads
    params = [param.view(grad.shape) for param, grad in zip(batch.params, grads, strict=True)]
    if not in_parts and all(grad.shape == grads[0].shape for grad in grads):
        denominators = _squares(parts[0].second, parts, batch.step) if known is None else known
        yield _Tile(parts, 0, params, direction, _average(parts[0].first, parts), denominators)
        return
    for index, (part, grad, param) in enumerate(zip(parts, grads, params, strict=True)):
        along = direction.some(index, index + 1)
        for rows in spans(grad) if in_parts else ((0, len(grad)),):
            state = [Rows(part, *rows)]
            if known is None:
                denominators = _squares(part.second, state, batch.step)
            else:
                denominators = known.some(index, index + 1).part(*rows, grad)
            average = _average(part.first, state)
            yield _Tile([part], rows[0], [param[slice(*rows)]], along.part(*rows), average, denominators)


def _average(first: Momentum, states: Sequence[State]) -> Average | None:
    """The averages as they are stored: the loop takes the gradients into them."""
    if not isinstance(first, FullMomentum):
        return None
    if not isinstance(first.storage, EightBits):
        return Average([state["exp_avg"] for state in states], first.beta1)
    codes, scales = ([state["exp_avg" + suffix] for state in states] for suffix in (CODES, SCALE))
    return Average(codes, first.beta1, scales)


def _squares(second: SecondMoment, states: Sequence[State], number: int) -> Denominators:
    """The averages themselves, which the loop updates with the gradients."""
    assert isinstance(second, ElementwiseSecondMoment)
    averages = [state["exp_avg_sq"] for state in states]
    return Denominators(averages, bias_correction(second.beta2, number), second.eps, squared=True)
