"""A step by torch's operations, on every device: parameters move in tiles of a bounded size."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators, Direction, State
from lightning_adapm.moments.tiles import spans, tile_numel
from lightning_adapm.step import by_kernels, watching
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.gradients import Gradients
from lightning_adapm.step.rounding import rounding_of, widened
from lightning_adapm.step.watching import Observer

Place = tuple[int, int, tuple[int, int] | None]
"""First part of a batch and the one after the last; of a single part perhaps first row and the one after the last."""


def step(batch: Batch, group: Mapping[str, Any], observer: Observer | None) -> None:
    """Take gradients that are finite into the moments of a batch, and move its parameters."""
    part, parts = batch.parts[0], batch.parts
    momentum = part.first.direction(batch.grads, parts, batch.step, batch.reduction)
    direction = momentum
    if part.second.whole_matrices:
        direction = by_kernels.applied(batch, momentum) or part.second.applied(momentum, batch.reduction)
    lr, clip = float(group["lr"]), group.get("clip_threshold")
    clip = None if clip is None or direction.clamp is None else clip * direction.clamp
    if batch.path.moved_by_kernels:
        by_kernels.move(batch, momentum, direction, group, clip, observer)
        return
    for index, (tile, along, denominators) in enumerate(tiles(batch, direction)):
        if observer is not None and index == 0:
            # after the second moment's sums, as by kernels: processes take either path, and must meet in one order
            watching.see_gradients(observer, batch)
        divisors, scale = denominators.settle(as_adamw=direction.clamp is None)
        used = along._replace(scale=along.scale * scale)
        if observer is not None:
            seen = along if momentum is direction else _cut(momentum, tile)
            settled = Denominators(divisors, 1.0, 0.0)
            watching.see_updates(observer, tile.parts, seen, used, settled, clip, tile.first)
        rounding = rounding_of(tile.parts, batch.step, group)
        moved = tile.params if rounding is None else widened(tile.params)
        _apply(moved, used, divisors, lr, part.decay, clip)
        if rounding is not None:
            rounding.write(tile.params, moved, tile.first)


def tiles(batch: Batch, direction: Direction) -> Iterator[tuple[Batch, Direction, Denominators]]:
    """Cut a batch and its directions into tiles, with denominators that have taken the gradients in."""
    parts, params, grads, step, _, reduction, *_ = batch
    second = parts[0].second
    in_tiles = second.elementwise and all(entry.storage.plain for entry in second.entries(parts[0].shape).values())
    known = None if in_tiles else second.denominators(grads, parts, step, reduction)
    for first, last, rows in _places(params, grads):
        states: Sequence[State] = parts[first:last]
        some, held = grads[first:last], params[first:last]
        if rows is not None:
            (grad,), (param,), (state,) = some, held, states
            some, held, states = [grad[slice(*rows)]], [param[slice(*rows)]], [Rows(state, *rows)]
        if known is None:
            denominators = second.denominators(some, states, step, reduction)
        else:
            denominators = known.some(first, last)
            denominators = denominators if rows is None else denominators.part(*rows, grads[first])
        tile = batch._replace(parts=parts[first:last], params=held, grads=some, start=first, rows=rows)
        yield tile, _cut(direction, tile), denominators


def _cut(direction: Direction, tile: Batch) -> Direction:
    """Select what a tile has of a direction of its batch."""
    some = direction.some(tile.start, tile.start + len(tile.parts))
    return some if tile.rows is None else some.part(*tile.rows)


def _places(params: Sequence[Tensor], grads: Sequence[Tensor]) -> Iterator[Place]:
    """Find places of tiles of a bounded size, or of parts that share kernels."""
    count = max(1, tile_numel(grads[0]) // max(1, grads[0].numel())) if isinstance(grads, Gradients) else len(grads)
    for first in range(0, len(grads), count):
        last = min(first + count, len(grads))
        grad, param = grads[first], params[first]
        # rows that the parameter has elsewhere, as interleaved heads, are not cut
        if last - first > 1 or grad.numel() <= tile_numel(grad) or len(param) != len(grad):
            yield first, last, None
        else:
            yield from ((first, last, rows) for rows in spans(grad))


class Rows:
    """View of some rows of an elementwise state."""

    def __init__(self, state: State, first: int, last: int) -> None:
        self._state, self._rows = state, slice(first, last)

    def __getitem__(self, key: str) -> Any:
        return self._state[key][self._rows]

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[key][self._rows] = value


def _apply(
    params: list[Tensor], used: Direction, divisors: list[Tensor], lr: float, decay: float, clip: float | None
) -> None:
    """Compute ``param = (1 - lr * decay) * param - lr * clamp(used / divisor)``."""
    keep = 1 - lr * decay
    if clip is None:  # AdamW's operations
        used = used.multiplied()
        same = all(update.shape == param.shape for update, param in zip(used.tensors, params, strict=True))
        if same and used.tensors[0].dtype == params[0].dtype:
            if decay:
                torch._foreach_mul_(params, keep)
            torch._foreach_addcdiv_(params, used.tensors, divisors, value=-lr * used.scale)
            return
    for param, update in zip(params, used.divided(divisors, -lr * used.scale), strict=True):
        if clip is not None:
            update.clamp_(-lr * clip, lr * clip)
        if update.dtype == param.dtype:
            torch.add(update.view(param.shape), param, alpha=keep, out=param)
        else:  # to the nearest number after either operation, as torch's optimizers do
            param.mul_(keep).add_(update.view(param.shape))
