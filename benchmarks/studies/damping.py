"""A denominator that bounds an update without a clamp: what no momentum averages joins the second moment.

Source: FOAM, arXiv 2512.07112, whose denominator is ``sqrt(v + E**2)`` with the residual ``E``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Momentum, State
from lightning_adapm.moments.batches import join, split
from lightning_adapm.step.batching import Batch


def move(batch: Batch, group: Mapping[str, Any], damping: float) -> None:
    """Move parameters by ``direction / (sqrt(v + damping * outside**2) + eps)``.

    ``v`` is bias-corrected, and ``outside`` is what the momentum passes on of the gradient as it is: the part that its
    subspace does not see, or all of it where there is no momentum. Its own update is at most ``damping**-0.5``.
    """
    parts, params, grads, step, *_ = batch
    first, second, decay = parts[0].first, parts[0].second, parts[0].decay
    lr, clip = float(group["lr"]), group["clip_threshold"]
    direction = first.direction(grads, parts, step).multiplied()
    roots, correction, eps, *_ = second.denominators(grads, parts, step).multiplied()
    for param, used, rest, root in zip(params, direction.tensors, outside(grads, parts, first), roots, strict=True):
        divisor = torch.addcmul((root / correction).square(), rest, rest, value=damping).sqrt_().add_(eps)
        update = used / divisor
        if clip is not None and direction.clamp is not None:
            bound = clip * direction.clamp / direction.scale
            update.clamp_(-bound, bound)
        param.mul_(1 - lr * decay).add_(update.view(param.shape), alpha=-lr * direction.scale)


def outside(grads: list[Tensor], states: Sequence[State], momentum: Momentum) -> list[Tensor]:
    """Part of each gradient that its momentum, already updated, does not average."""
    if momentum.name == "none":
        return grads
    grad = join(grads)
    right = join([state["exp_avg_r"] for state in states]).to(grad.dtype)
    return split(torch.baddbmm(grad, grad @ right.mT, right, alpha=-1), grads)
