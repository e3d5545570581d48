"""A step by torch's operations, on every device: parameters move in tiles of a bounded size."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators, Direction, State
from lightning_adapm.moments.tiles import fits_a_tile, spans
from lightning_adapm.step import by_kernels, watching
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.rounding import StochasticRounding, widened
from lightning_adapm.step.watching import Observer


class Tile(NamedTuple):
    """Pieces of one shape, or some rows of a single one, with their gradients, directions and denominators."""

    params: list[Tensor]
    direction: Direction
    denominators: Denominators
    first: int = 0
    """First of the rows."""

    def of(self, direction: Direction) -> Direction:
        """The tile of another direction of the batch."""
        own, whole = self.direction.tensors, direction.tensors
        if len(whole) > 1 or whole[0].numel() == own[0].numel():
            return direction
        return direction.part(self.first, self.first + len(own[0]))


def step(batch: Batch, group: Mapping[str, Any], observer: Observer | None) -> None:
    """Take gradients that are finite into the moments of a batch, and move its parameters."""
    part, parts = batch.parts[0], batch.parts
    momentum = part.first.direction(batch.grads, parts, batch.step, batch.reduction)
    direction = by_kernels.applied(batch, momentum) or part.second.applied(momentum, batch.reduction)
    lr, clip = float(group["lr"]), group.get("clip_threshold")
    clip = None if clip is None or direction.clamp is None else clip * direction.clamp
    if batch.path.moved_by_kernels:
        by_kernels.move(batch, momentum, direction, group, clip, observer)
        return
    if observer is not None:
        watching.see_gradients(observer, batch)
    rounding = StochasticRounding.of(parts, batch.step, group)
    for tile in tiles(batch, direction):
        used = tile.direction.multiplied()
        moved = tile.params if rounding is None else widened(tile.params)
        if part.decay:
            torch._foreach_mul_(moved, 1 - lr * part.decay)
        divisors, scale = tile.denominators.settle(as_adamw=direction.clamp is None)
        if observer is not None:
            shown = used._replace(scale=used.scale * scale)
            seen = used if momentum is direction else tile.of(momentum)
            watching.see_updates(observer, parts, seen, shown, watching.Divisors(divisors), clip, tile.first)
        _apply(moved, used.tensors, divisors, used.scale * scale, lr, clip, used.scratch)
        if rounding is not None:
            rounding.write(tile.params, moved, tile.first)


def tiles(batch: Batch, direction: Direction) -> Iterator[Tile]:
    """A batch whole or in tiles, with denominators that have taken its gradients in."""
    parts, params, grads, step, _, reduction = batch
    second = parts[0].second
    # whole: parts that share kernels, small ones, and rows that the parameter has elsewhere, as interleaved heads
    if len(parts) > 1 or fits_a_tile(grads[0]) or len(params[0]) != len(grads[0]):
        yield Tile(params, direction, second.denominators(grads, parts, step, reduction))
        return
    in_tiles = second.elementwise and all(entry.storage.plain for entry in second.entries(parts[0].shape).values())
    known = None if in_tiles else second.denominators(grads, parts, step, reduction)
    for first, last in spans(grads[0]):
        if known is None:
            some = second.denominators([grads[0][first:last]], [_Rows(parts[0], first, last)], step, reduction)
        else:
            some = known.part(first, last, grads[0])
        yield Tile([params[0][first:last]], direction.part(first, last), some, first)


class _Rows:
    """View of some rows of an elementwise state."""

    def __init__(self, state: State, first: int, last: int) -> None:
        self._state, self._rows = state, slice(first, last)

    def __getitem__(self, key: str) -> Any:
        return self._state[key][self._rows]

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[key][self._rows] = value


def _apply(
    params: list[Tensor],
    used: list[Tensor],
    divisors: list[Tensor],
    scale: float,
    lr: float,
    clip: float | None,
    scratch: bool,
) -> None:
    """Compute ``param -= lr * clamp(scale * used / divisor)``; overwrites ``used`` where it is scratch."""
    same = all(update.shape == param.shape for update, param in zip(used, params, strict=True))
    if clip is None and same and used[0].dtype == params[0].dtype:
        torch._foreach_addcdiv_(params, used, divisors, value=-lr * scale)
        return
    if scratch:
        torch._foreach_div_(used, divisors)
    else:
        used = list(torch._foreach_div(used, divisors))
    for param, update in zip(params, used, strict=True):
        if clip is not None:
            update.clamp_(-clip / scale, clip / scale)
        param.add_(update.view(param.shape), alpha=-lr * scale)
