"""LOMO and AdaLomo: no momentum, and gradients that are used while backward is still running."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_adapm.momentum import State
from lightning_adapm.optim.adapm import AdaPM
from lightning_adapm.optim.tasks import Plan, Task, reduction_of
from lightning_adapm.roles import Piece
from lightning_adapm.second_moment import Denominators, SecondMoment, largest, mean_squares
from lightning_adapm.sharding import ONE_PROCESS, Reduction

_ADDED = 1e-30
"""To every squared gradient, so that a zero one does not divide by zero."""

_UNUSED = ("betas", "eps", "rank", "update_proj_gap", "debias", "second_moment", "state_dtype", "basis")


@dataclass(frozen=True)
class NoSecondMoment:
    """The gradient is not divided by anything."""

    elementwise: ClassVar[bool] = False

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        return {}

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        return Denominators([grad.new_ones(()) for grad in grads], 1.0, 0.0)


@dataclass(frozen=True)
class RelativeSecondMoment:
    """AdaLomo's: row and column means of the squared gradient, decaying by ``1 - step**-0.8``; elementwise for what is
    not a matrix.
    """

    elementwise: ClassVar[bool] = False

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        if len(shape) < 2:
            return {"exp_avg_sq": like.new_zeros(shape)}
        *batch, m, n = shape
        return {"exp_avg_sq_row": like.new_zeros(*batch, m, 1), "exp_avg_sq_col": like.new_zeros(*batch, 1, n)}

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        weight = step**-0.8
        if grads[0].dim() < 2:
            averages = [state["exp_avg_sq"] for state in states]
            torch._foreach_lerp_(averages, [_squares(grad) for grad in grads], weight)
            return Denominators(list(torch._foreach_sqrt(averages)), 1.0, 0.0)
        rows, columns = ([state[key] for state in states] for key in ("exp_avg_sq_row", "exp_avg_sq_col"))
        for averages, dim in ((rows, -1), (columns, -2)):
            means = [mean + _ADDED for mean in mean_squares(grads, dim, reduction)]
            torch._foreach_lerp_(averages, means, weight)
        shares = [(row / mean).sqrt_() for row, mean in zip(rows, reduction.means(rows), strict=True)]
        roots = [share * column.sqrt() for share, column in zip(shares, columns, strict=True)]
        return Denominators(roots, 1.0, 0.0)


def _squares(grad: Tensor) -> Tensor:
    # bounded: infinity would stay in the average, and become NaN in the next
    return grad.square().add_(_ADDED).clamp_max_(largest(grad.dtype))


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
