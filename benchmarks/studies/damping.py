"""A denominator that bounds an update without a clamp: what no momentum averages joins the second moment.

Source: FOAM, arXiv 2512.07112, whose denominator is ``sqrt(v + E**2)`` with the residual ``E``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.base import State, join, split
from lightning_adapm.step.parts import Plan, Task


def move(
    tasks: list[Task], grads: list[Tensor], plan: Plan, step: int, group: Mapping[str, Any], damping: float
) -> None:
    """Move parameters by ``direction / (sqrt(v + damping * outside**2) + eps)``.

    ``v`` is bias-corrected, and ``outside`` is what the momentum passes on of the gradient as it is: the part that its
    subspace does not see, or all of it where there is no momentum. Its own update is at most ``damping**-0.5``.
    """
    states, lr, clip = [task.state for task in tasks], float(group["lr"]), group["clip_threshold"]
    direction = plan.momentum.direction(grads, states, step).multiplied()
    roots, correction, eps = plan.second_moment.denominators(grads, states, step)
    parts = zip(tasks, direction.tensors, outside(grads, states, plan), roots, strict=True)
    for task, used, rest, root in parts:
        divisor = torch.addcmul((root / correction).square(), rest, rest, value=damping).sqrt_().add_(eps)
        update = used / divisor
        if clip is not None and direction.clamp is not None:
            bound = clip * direction.clamp / direction.scale
            update.clamp_(-bound, bound)
        task.param.mul_(1 - lr * plan.decay).add_(update.view(task.param.shape), alpha=-lr * direction.scale)


def outside(grads: list[Tensor], states: Sequence[State], plan: Plan) -> list[Tensor]:
    """Part of each gradient that its momentum does not average, after the momentum's update."""
    if plan.momentum.name == "none":
        return grads
    grad = join(grads)
    return split(lowrank.residual(grad, join([state["exp_avg_r"] for state in states]).to(grad.dtype)), grads)
