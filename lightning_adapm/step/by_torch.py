"""The last part of a step: from gradients and a direction to new parameters, in tiles of a bounded size."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators, Direction, SecondMoment, State
from lightning_adapm.moments.orthogonal import Orthogonal
from lightning_adapm.sharding.reduction import Reduction
from lightning_adapm.step import by_kernels, kernels
from lightning_adapm.step.parts import Observer, Task

# A matrix of more elements than this is updated in parts: a table of tokens can have 1e9 of them, and temporaries of
# its size would be larger than all the state that is saved.
_TILE_NUMEL = 1 << 22


class Tile(NamedTuple):
    """Pieces of one shape, or some rows of a single one, with their gradients, directions and denominators."""

    params: list[Tensor]
    direction: Direction
    denominators: Denominators


def update(
    tasks: list[Task],
    grads: list[Tensor],
    direction: Direction,
    second_moment: SecondMoment,
    step: int,
    reduction: Reduction,
    decay: float,
    group: Mapping[str, Any],
    observer: Observer | None,
) -> None:
    """Update second moments with ``grads`` of ``tasks`` of one shape, and move their parameters along ``direction``."""
    remembered = None
    if isinstance(second_moment, Orthogonal):
        direction = direction.multiplied()
        remembered = None if observer is None else direction
        direction = second_moment.applied(direction, reduction)
    lr, clip = float(group["lr"]), group.get("clip_threshold")
    clip = None if clip is None or direction.clamp is None else clip * direction.clamp
    if observer is None and kernels.movable([task.param for task in tasks], direction.tensors):
        by_kernels.move(tasks, grads, direction, second_moment, step, reduction, lr, decay, clip)
        return
    for tile in _tiles(tasks, grads, direction, second_moment, step, reduction, whole=observer is not None):
        used = tile.direction.multiplied()
        if decay:
            torch._foreach_mul_(tile.params, 1 - lr * decay)
        divisors, scale = tile.denominators.settle(as_adamw=direction.clamp is None)
        if observer is not None:
            _observe(observer, tasks, remembered or used, used, divisors, scale, clip)
        _apply(tile.params, used.tensors, divisors, used.scale * scale, lr, clip, used.scratch)


def _tiles(
    tasks: list[Task],
    grads: list[Tensor],
    direction: Direction,
    second_moment: SecondMoment,
    step: int,
    reduction: Reduction,
    whole: bool,
) -> Iterator[Tile]:
    params, states = [task.param for task in tasks], [task.state for task in tasks]
    rows = _rows_of_a_tile(params[0], grads[0])
    if whole or len(tasks) > 1 or rows is None:
        yield Tile(params, direction, second_moment.denominators(grads, states, step, reduction))
        return
    known = None if second_moment.elementwise else second_moment.denominators(grads, states, step, reduction)
    for first in range(0, len(grads[0]), rows):
        last = min(first + rows, len(grads[0]))
        if known is None:
            some = second_moment.denominators([grads[0][first:last]], [_Rows(states[0], first, last)], step, reduction)
        else:
            (root,) = known.roots
            each = root.dim() == grads[0].dim() and len(root) == len(grads[0])
            some = known._replace(roots=[root[first:last] if each else root.clone()])
        yield Tile([params[0][first:last]], direction.part(first, last), some)


def _rows_of_a_tile(param: Tensor, grad: Tensor) -> int | None:
    """Size of a tile in the gradient's first dimension; None for all, as for a scalar and for interleaved heads."""
    if grad.numel() <= _TILE_NUMEL or len(param) != len(grad):
        return None
    return max(1, _TILE_NUMEL * len(grad) // grad.numel())


class _Rows:
    """View of some rows of an elementwise state."""

    def __init__(self, state: State, first: int, last: int) -> None:
        self._state, self._rows = state, slice(first, last)

    def __getitem__(self, key: str) -> Any:
        return self._state[key][self._rows]

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[key][self._rows] = value


def _observe(
    observer: Observer,
    tasks: list[Task],
    momentum: Direction,
    used: Direction,
    divisors: list[Tensor],
    scale: float,
    clip: float | None,
) -> None:
    for task, tensor, moved, divisor in zip(tasks, momentum.tensors, used.tensors, divisors, strict=True):
        direction, update = tensor * momentum.scale, moved * (used.scale * scale) / divisor
        if task.shard is not None:
            direction, update = task.shard.held_only(direction), task.shard.held_only(update)
        observer(task, direction, update, clip)


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
