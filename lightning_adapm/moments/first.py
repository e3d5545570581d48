"""First moments: none, full, low-rank. Each makes its state and turns gradients into a direction.

A momentum works on a list of matrices of one shape, ``(m, n)``, or of stacks ``(b, m, n)``. Other parameters have
:class:`NoMomentum` or :class:`FullMomentum`, which accept any shape. ``step`` counts from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.base import Direction, Stack, State, join, split, store, write
from lightning_adapm.sharding.find import has_values
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction


@dataclass(frozen=True)
class NoMomentum:
    """No first moment: the direction is the gradient.

    Args:
        clamp: Factor of ``clip_threshold`` in the bound on the update's entries.
    """

    clamp: float = 1.0
    name: ClassVar[str] = "none"

    def due(self, step: int) -> bool:
        return False

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        return {}

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        return Direction(grads, 1.0, scratch=False, clamp=self.clamp)


@dataclass(frozen=True)
class FullMomentum:
    """AdamW's first moment: ``exp_avg``, of the parameter's shape."""

    beta1: float
    name: ClassVar[str] = "full"

    def due(self, step: int) -> bool:
        return False

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        return {"exp_avg": like.new_zeros(shape)}

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        averages = [state["exp_avg"] for state in states]
        if averages[0].dtype == grads[0].dtype:
            torch._foreach_lerp_(averages, grads, 1 - self.beta1)
            used = averages
        else:  # the arithmetic keeps the gradients' precision, only the stored value is rounded
            used = [
                torch.lerp(average.to(grad.dtype), grad, 1 - self.beta1)
                for average, grad in zip(averages, grads, strict=True)
            ]
            write(used, averages)
        return Direction(used, 1 / (1 - self.beta1**step), scratch=used is not averages, clamp=None)


@dataclass(frozen=True)
class LowRankMomentum:
    """AdaPM's low-rank first moment: factors ``exp_avg_l`` ``(m, r)`` and ``exp_avg_r`` ``(r, n)``.

    Args:
        rank: Rank ``r``. With ``r >= n`` the basis is the identity and is never refreshed; the result is AdamW's.
        beta1: Decay of the moving average.
        update_proj_gap: Steps between two refreshes of the basis. The first comes with the first non-zero gradient, the
            others at the steps ``1 + offset + k * update_proj_gap`` of the parameter's own count.
        debias: Whether the gradient's part outside the subspace is added (the paper's residual correction). Without it,
            the direction is the plain low-rank moving average.
        flush: Whether a refresh applies at once the momentum that the new subspace does not hold. It is multiplied by
            ``beta1 / (1 - beta1)``, the sum of its future contributions to a full average. Otherwise it is dropped.
        columns: First column of the basis that this process keeps, and the one after the last, where processes shard
            the basis. Each step then gathers it.
        offset: Offset of the refreshes, so that similar pieces do not all refresh in one step.

    The state also holds the number ``seeded``, which is 1 once every matrix of the piece has a basis. Until then, each
    step looks for the first non-zero gradient, which reads one value back from the device.
    """

    rank: int
    beta1: float
    update_proj_gap: int
    debias: bool = True
    flush: bool = True
    columns: tuple[int, int] | None = None
    offset: int = field(default=0, compare=False)
    name: ClassVar[str] = "low_rank"
    clamp: ClassVar[float] = 1.0

    @property
    def payout(self) -> float:
        """Factor of the momentum that leaves the subspace at a refresh; see ``flush``."""
        return self.beta1 / (1 - self.beta1) if self.flush else 0.0

    def due(self, step: int) -> bool:
        return (step - 1 - self.offset) % self.update_proj_gap == 0

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        *batch, m, n = shape
        rank = min(self.rank, n)
        first, last = self.columns or (0, n)
        right = like.new_zeros(*batch, rank, last - first)
        if rank == n:
            right.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return {"exp_avg_l": like.new_zeros(*batch, m, rank), "exp_avg_r": right, "seeded": int(rank == n)}

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        grad = grads if isinstance(grads, Stack) else join(grads)
        left, right = (join([state[key] for state in states]) for key in ("exp_avg_l", "exp_avg_r"))
        if self.columns is not None:
            right = reduction.columns(right, grad.shape[-1])
        left, right = left.to(grad.dtype), right.to(grad.dtype)
        new_right = self._next_basis(grad, left, right, states, step, reduction)
        moved = left if new_right is right else lowrank.move_left(left, right, new_right)

        projected = grad @ new_right.mT
        reduction.rows(projected)
        new_left = torch.lerp(moved, projected, 1 - self.beta1)
        inside = new_left / (1 - self.beta1**step)
        factors = inside - projected, new_right
        if new_right is not right and self.flush:
            factors = (
                torch.cat([inside - projected - self.payout * moved, self.payout * left], dim=-1),
                torch.cat([new_right, right], dim=-2),
            )
        store(new_left, [state["exp_avg_l"] for state in states])  # only now: left and right may be views of it
        if new_right is not right:
            kept = new_right if self.columns is None else new_right[..., slice(*self.columns)]
            store(kept, [state["exp_avg_r"] for state in states])
        if not self.debias:
            return Direction(split(inside @ new_right, grads), 1.0, scratch=True, clamp=self.clamp)
        return Direction(grads, 1.0, scratch=False, clamp=self.clamp, factors=factors)

    def _next_basis(
        self,
        grad: Tensor | Stack,
        left: Tensor,
        right: Tensor,
        states: Sequence[State],
        step: int,
        reduction: Reduction,
    ) -> Tensor:
        """Basis of this step, which is ``right`` itself without a refresh."""
        if right.shape[-2] == right.shape[-1]:
            return right
        due = self.due(step)
        if all(state["seeded"] for state in states):
            return lowrank.refresh_basis(grad, left, right, self.beta1, reduction) if due else right
        without = ~right.any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)
        if not has_values(right):
            for state in states:
                state["seeded"] = 1
            return lowrank.refresh_basis(grad, left, right, self.beta1, reduction)
        entries = join(grad) if isinstance(grad, Stack) else grad
        shows = reduction.any((entries != 0).any(dim=-1, keepdim=True).any(dim=-2, keepdim=True))
        if not due and not (without & shows).any():
            return right
        new_right = lowrank.refresh_basis(grad, left, right, self.beta1, reduction)
        if not due:
            new_right = torch.where(without, new_right, right)
        seeded = iter(new_right.any(dim=-1).any(dim=-1).tolist())
        for state in states:
            matrices = state["exp_avg_r"].shape[0] if state["exp_avg_r"].dim() == 3 else 1
            state["seeded"] = int(sum(islice(seeded, matrices)) == matrices)
        return new_right
