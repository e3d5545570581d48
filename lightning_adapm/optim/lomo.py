"""LOMO and AdaLomo: no momentum, and gradients that are used while backward is still running."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import SecondMoment
from lightning_adapm.moments.second import NoSecondMoment, RelativeSecondMoment
from lightning_adapm.optim.adapm import AdaPM
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.reduction import Reduction
from lightning_adapm.step.parts import Plan, Task, reduction_of

_UNUSED = ("betas", "eps", "rank", "update_proj_gap", "debias", "second_moment", "state_dtype", "basis")


class Lomo(AdaPM):
    """LOMO (arXiv 2306.09782): stochastic gradient descent that uses each gradient inside backward.

    There is no state but a step counter.

    Args:
        params: as for :class:`~lightning_adapm.AdaPM`, whose remaining options it takes.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        unmatched: roles change nothing here, so that none need be known.
        update_in_backward: see AdaPM.

    Raises:
        ValueError: an option out of range.
    """

    unused = _UNUSED

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        unmatched: str = "none",
        update_in_backward: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            weight_decay=weight_decay,
            momentum="none",
            clip_threshold=None,
            unmatched=unmatched,
            update_in_backward=update_in_backward,
            **options,
        )

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        return NoSecondMoment()


class AdaLomo(AdaPM):
    """AdaLomo (arXiv 2310.10195): LOMO with a factored second moment and updates relative to the parameter's size.

    ``U = G / sqrt(v)`` with ``v`` of row and column means, ``U /= max(1, RMS(U) / clip_threshold)``, and a step of
    ``lr * max(1e-3, RMS(W)) * U`` after decoupled weight decay with the same factor. It works on pieces: of a fused
    weight the queries, the keys and the values by themselves.

    Args:
        params: as for :class:`~lightning_adapm.AdaPM`, whose remaining options it takes.
        lr: learning rate, relative to the size of the parameters.
        weight_decay: decoupled weight decay.
        clip_threshold: bound on the root mean square of ``U``.
        unmatched: momentum is nowhere, so that roles need not be known: what is not found is one piece.
        update_in_backward: see AdaPM.

    Raises:
        ValueError: an option out of range.
    """

    unused = _UNUSED

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        unmatched: str = "none",
        update_in_backward: bool = True,
        **options: Any,
    ) -> None:
        if clip_threshold is None:
            raise ValueError("clip_threshold must be a number > 0, but got None; a large one is no bound")
        super().__init__(
            params,
            lr,
            weight_decay=weight_decay,
            momentum="none",
            clip_threshold=clip_threshold,
            unmatched=unmatched,
            update_in_backward=update_in_backward,
            **options,
        )

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        return RelativeSecondMoment()

    def _move(self, tasks: list[Task], grads: list[Tensor], plan: Plan, step: int, group: Mapping[str, Any]) -> None:
        states, decay, reduction = [task.state for task in tasks], plan.decay, reduction_of(tasks)
        lr, clip = float(group["lr"]), float(group["clip_threshold"])
        params = [task.param for task in tasks]
        divisors, _ = plan.second_moment.denominators(grads, states, step, reduction).settle(True)
        updates = list(torch._foreach_div(grads, divisors))
        # of the matrices: a parameter's own view may have a dimension for heads, or those of a convolution
        values = [param.to(grad.dtype).reshape(grad.shape) for param, grad in zip(params, grads, strict=True)]
        sizes = _root_mean_squares(values, reduction)
        lengths = _root_mean_squares(updates, reduction)
        for param, update, size, length in zip(params, updates, sizes, lengths, strict=True):
            rate = lr * size.clamp_min(1e-3)
            if decay:
                param.mul_(1 - rate * decay)
            param.sub_((update * (rate / (length / clip).clamp_min(1.0))).view(param.shape))


def _root_mean_squares(values: list[Tensor], reduction: Reduction) -> list[Tensor]:
    """Of each tensor, over all processes; of each matrix in a stack by itself."""
    dims = [(-2, -1) if value.dim() > 1 else None for value in values]
    sums = [value.square().sum(dim, keepdim=dim is not None) for value, dim in zip(values, dims, strict=True)]
    counts = [
        size * (value.shape[-1] if value.dim() > 1 else 1)
        for size, value in zip(reduction.sizes(values), values, strict=True)
    ]
    return [(total / max(1, count)).sqrt() for total, count in zip(reduction.total(sums), counts, strict=True)]
