"""A step on a CPU by :mod:`lightning_adapm.step.loops`: torch's operations find factors and sums, loops do the rest.

Full momentum and elementwise second moments take gradients in where they move the parameters, in one pass over memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators, Direction, Momentum, SecondMoment, State
from lightning_adapm.moments.batches import join
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum
from lightning_adapm.moments.quantized import CODES, SCALE, EightBits, decoded_from
from lightning_adapm.moments.second import ElementwiseSecondMoment, FactoredSecondMoment, bias_correction
from lightning_adapm.moments.tiles import spans
from lightning_adapm.step import loops, watching
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.by_torch import Rows
from lightning_adapm.step.gradients import Gradients
from lightning_adapm.step.loops import Average, Reading
from lightning_adapm.step.parts import Part
from lightning_adapm.step.watching import Observer

_LARGEST_BASIS = 1 << 17
"""Most elements of a basis that loops multiply by, which a core's cache is to hold; the library takes larger ones."""


def step(batch: Batch, group: Mapping[str, Any], observer: Observer | None) -> None:
    """Take gradients that are finite into the moments of a batch, and move its parameters."""
    grads, parts, first, second = batch.grads, batch.parts, batch.parts[0].first, batch.parts[0].second
    if isinstance(first, FullMomentum):  # taken further where it is used
        direction = Direction(grads, 1 / (1 - first.beta1**batch.step), scratch=False, clamp=None)
    else:
        direction = first.direction(grads, parts, batch.step, batch.reduction)
    beta2 = second.beta2 if isinstance(second, ElementwiseSecondMoment) else None
    known = None if beta2 is not None else second.denominators(grads, parts, batch.step, batch.reduction)
    if observer is not None:
        watching.see_gradients(observer, batch)
    lr, clip = float(group["lr"]), group.get("clip_threshold")
    clip = None if clip is None or direction.clamp is None else float(clip * direction.clamp)
    for tile in _tiles(batch, direction, known, in_parts=observer is not None and isinstance(first, FullMomentum)):
        seen = None if observer is None else tile.taken
        loops.move(
            tile.param,
            tile.grad,
            tile.denominators,
            rate=lr * direction.scale,
            keep=1 - lr * tile.part.decay,
            bound=None if clip is None else lr * clip,
            average=tile.average,
            factors=tile.along.factors,
            beta2=beta2,
        )
        if observer is not None and seen is not None:
            watching.see_updates(observer, [tile.part], seen, seen, tile.denominators, clip, tile.start)


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
        matrices = [matrix for grad in self for matrix in (grad if grad.dim() == 3 else (grad,))]
        return loops.read(matrices, self._bases, self._columns)

    @property
    def finite(self) -> bool:
        return math.isfinite(float(self._reading.squares.sum()))

    def squares(self, dim: int | None) -> list[Tensor]:
        sums = self._reading.columns if dim == -2 else self._reading.squares
        assert sums is not None
        if dim is None:
            return [part.sum() for part in sums.chunk(len(self))]
        shape = list(self[0].shape)
        shape[dim] = 1
        return [part.view(shape) for part in sums.chunk(len(self))]

    def __matmul__(self, columns: Tensor) -> Tensor:
        projected = self._reading.projected
        if projected is None or self._bases is None or not torch.equal(columns.mT, self._bases):
            return super().__matmul__(columns)
        return projected


def wrapped(batch: Batch) -> Callable[[Iterable[Tensor]], Gradients]:
    """How to wrap the gradients of a batch, whose moments determine what will be asked for."""
    first, second, bases = batch.parts[0].first, batch.parts[0].second, None
    if isinstance(first, LowRankMomentum) and not first.due(batch.step) and all(part["seeded"] for part in batch.parts):
        kept = first.bases(batch.parts)
        if kept[0].shape[-2:].numel() <= _LARGEST_BASIS:
            bases = join(kept).float().contiguous()
    columns = isinstance(second, FactoredSecondMoment)
    return Gradients if bases is None and not columns else partial(ReadGradients, bases=bases, columns=columns)


class _Tile(NamedTuple):
    """Some rows of a part, or matrices of a stack."""

    part: Part
    start: int
    """The first of them."""
    param: Tensor
    grad: Tensor
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
        before = values if scales is None else decoded_from(values, scales)
        return self.along._replace(tensors=[torch.lerp(before, self.grad, 1 - beta1)])


def _tiles(batch: Batch, direction: Direction, known: Denominators | None, in_parts: bool) -> Iterator[_Tile]:
    """Cut a batch into parts, and these into tiles of a bounded size where a monitor is shown averages in advance."""
    for index, (part, grad, param) in enumerate(zip(batch.parts, batch.grads, batch.params, strict=True)):
        along, whole = direction.some(index, index + 1), param.view(grad.shape)
        for rows in spans(grad) if in_parts else ((0, len(grad)),):
            span, state = slice(*rows), Rows(part, *rows)
            if known is None:
                denominators = _squares(part.second, state, batch.step)
            else:
                denominators = known.some(index, index + 1).part(*rows, grad)
            average = _average(part.first, state)
            yield _Tile(part, rows[0], whole[span], grad[span], along.part(*rows), average, denominators)


def _average(first: Momentum, state: State) -> Average | None:
    """The average as it is stored: the loop takes the gradient into it."""
    if not isinstance(first, FullMomentum):
        return None
    if isinstance(first.storage, EightBits):
        return Average(state["exp_avg" + CODES], first.beta1, state["exp_avg" + SCALE])
    return Average(state["exp_avg"], first.beta1)


def _squares(second: SecondMoment, state: State, number: int) -> Denominators:
    """The averages themselves, which the loop updates with the gradient."""
    assert isinstance(second, ElementwiseSecondMoment)
    return Denominators([state["exp_avg_sq"]], bias_correction(second.beta2, number), second.eps, squared=True)
