"""First moments: none, full, low-rank. Each makes its state and turns gradients into a direction.

A momentum works on a list of matrices of one shape, ``(m, n)``, or of stacks ``(b, m, n)``. Other parameters have
:class:`NoMomentum` or :class:`FullMomentum`, which accept any shape. ``step`` counts from 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.base import Direction, Momentum, State
from lightning_adapm.moments.batches import Stack, join, split
from lightning_adapm.moments.storage import EXACT, Entry, Storage
from lightning_adapm.sharding.find import has_values
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction


@dataclass(frozen=True)
class NoMomentum(Momentum):
    """No first moment: the direction is the gradient.

    Args:
        clamp: Factor of ``clip_threshold`` in the bound on the update's entries.
    """

    clamp: float = 1.0
    name: ClassVar[str] = "none"

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        return Direction(grads, 1.0, scratch=False, clamp=self.clamp)


@dataclass(frozen=True)
class FullMomentum(Momentum):
    """AdamW's first moment: ``exp_avg``, of the parameter's shape."""

    beta1: float
    storage: Storage = EXACT
    name: ClassVar[str] = "full"
    keys: ClassVar[frozenset[str]] = frozenset({"exp_avg"})

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        return {"exp_avg": Entry(shape, rows=True, storage=self.storage)}

    @classmethod
    def fits(cls, saved: Mapping[str, Any], shape: torch.Size) -> bool:
        return bool(saved["exp_avg"].shape == shape)

    @classmethod
    def dense(cls, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
        average: Tensor = saved["exp_avg"]
        return average

    def from_dense(self, dense: Tensor, state: dict[str, Any]) -> None:
        self.storage.write([state], "exp_avg", [dense])

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        averages = self.storage.read(states, "exp_avg")
        if averages[0].dtype == grads[0].dtype:
            torch._foreach_lerp_(averages, grads, 1 - self.beta1)
            used = averages
        else:  # the arithmetic keeps the gradients' precision, only the stored value is rounded
            used = [
                torch.lerp(average.to(grad.dtype), grad, 1 - self.beta1)
                for average, grad in zip(averages, grads, strict=True)
            ]
        self.storage.write(states, "exp_avg", used)
        scratch = used is not averages or not self.storage.plain
        return Direction(used, 1 / (1 - self.beta1**step), scratch=scratch, clamp=None)


@dataclass(frozen=True)
class LowRankMomentum(Momentum):
    """AdaPM's low-rank first moment: factors ``exp_avg_l`` ``(m, r)`` and ``exp_avg_r`` ``(r, n)``.

    The direction is ``G + (L / (1 - beta1**t) - G Rᵀ) R``, the bias-corrected average inside the subspace and the
    gradient itself outside. While the basis stays, that is the paper's ``M~ + beta1 / (1 - beta1) E``.

    Args:
        rank: ``r``. With ``r >= n`` the basis is the identity, is never refreshed, and the result is AdamW's.
        beta1: Decay of the moving average.
        update_proj_gap: Steps from one refresh of the basis to the next. The first comes with the first non-zero
            gradient, the others at the steps ``1 + offset + k * update_proj_gap`` of the parameter's own count.
        debias: Add the gradient outside the subspace (the paper's residual correction). Without it the direction is the
            plain low-rank moving average.
        flush: At a refresh, pay out at once the momentum that the new subspace does not contain:
            ``beta1 / (1 - beta1)`` times it, the sum of its future contributions to a full average. Without it that
            part is dropped.
        offset: Staggers the refreshes of pieces that are otherwise alike, so that no step pays for all of them.

    The state also holds the number ``seeded``, which is 1 once every matrix of the piece has a basis. Until then, each
    step looks for the first non-zero gradient, which reads one value back from the device.
    """

    rank: int
    beta1: float
    update_proj_gap: int
    debias: bool = True
    flush: bool = True
    offset: int = field(default=0, compare=False)
    storage: Storage = EXACT
    name: ClassVar[str] = "low_rank"
    keys: ClassVar[frozenset[str]] = frozenset({"exp_avg_l", "exp_avg_r", "seeded"})
    has_basis: ClassVar[bool] = True
    clamp: ClassVar[float] = 1.0

    def basis(self, state: State) -> Tensor | None:
        (right,) = self.bases([state])
        return right

    def bases(self, states: Sequence[State]) -> list[Tensor]:
        """The columns of bases that this process keeps."""
        return self.storage.of_bases.read(states, "exp_avg_r")

    @property
    def payout(self) -> float:
        """Factor of the momentum that leaves the subspace at a refresh; see ``flush``."""
        return self.beta1 / (1 - self.beta1) if self.flush else 0.0

    def due(self, step: int) -> bool:
        return (step - 1 - self.offset) % self.update_proj_gap == 0

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        *batch, m, n = shape
        rank = min(self.rank, n)
        return {
            "exp_avg_l": Entry(torch.Size((*batch, m, rank)), rows=True, storage=self.storage),
            "exp_avg_r": Entry(torch.Size((*batch, rank, n)), columns=True, storage=self.storage.of_bases),
            "seeded": Entry(None),
        }

    def make(self, shape: torch.Size, like: Tensor, kept: tuple[int, int] | None = None) -> dict[str, Any]:
        made = super().make(shape, like, kept)
        n = shape[-1]
        if self.rank >= n:
            identity = torch.eye(n, dtype=like.dtype, device=like.device)[:, slice(*(kept or (0, n)))]
            self.storage.of_bases.write([made], "exp_avg_r", [identity.expand(*shape[:-2], *identity.shape)])
            made["seeded"] = 1
        return made

    def numbers(self, state: Mapping[str, Any]) -> dict[str, int]:
        right = state["exp_avg_r"]
        return {"seeded": int(not has_values(right) or right.any(dim=-1).any(dim=-1).all())}

    @classmethod
    def fits(cls, saved: Mapping[str, Any], shape: torch.Size) -> bool:
        return lowrank.are_factors(saved["exp_avg_l"], saved["exp_avg_r"], shape)

    @classmethod
    def dense(cls, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
        return saved["exp_avg_l"].float() @ saved["exp_avg_r"].float()

    def from_dense(self, dense: Tensor, state: dict[str, Any]) -> None:
        shape = self.bases([state])[0].shape
        self._fill(state, *lowrank.factorized(dense, shape[-2]))

    def resized(self, saved: Mapping[str, Any], state: dict[str, Any]) -> bool:
        shape = self.bases([state])[0].shape
        self._fill(state, *lowrank.resized(saved["exp_avg_l"], saved["exp_avg_r"], shape[-2]))
        return True

    def _fill(self, state: dict[str, Any], left: Tensor, right: Tensor) -> None:
        self.storage.write([state], "exp_avg_l", [left])
        self.storage.of_bases.write([state], "exp_avg_r", [right])
        state["seeded"] = int(not has_values(right) or right.any())

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        grad = grads if isinstance(grads, Stack) else join(grads)
        lefts, rights = self.storage.read(states, "exp_avg_l"), self.bases(states)
        left, right = join(lefts), join(rights)
        right = reduction.columns(right, grad.shape[-1])
        left, right = left.to(grad.dtype), right.to(grad.dtype)
        new_right = self._next_basis(grad, left, right, states, step, reduction)
        moved = left if new_right is right else lowrank.move_left(left, right, new_right)

        projected = grad @ new_right.mT
        reduction.rows(projected)
        new_left = torch.lerp(moved, projected, 1 - self.beta1)
        inside = new_left / (1 - self.beta1**step)
        if self.debias:  # in place: of a table of tokens, each of these is as large as the state
            inside.sub_(projected)
        del projected
        factors = inside, new_right
        if self.debias and self.flush and new_right is not right:
            factors = (
                torch.cat([inside.sub_(self.payout * moved), self.payout * left], dim=-1),
                torch.cat([new_right, right], dim=-2),
            )
        self.storage.write(states, "exp_avg_l", split(new_left, lefts))  # only now: left may be a view of it
        if new_right is not right:
            self.storage.of_bases.write(states, "exp_avg_r", split(reduction.kept_columns(new_right), rights))
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
        if not all(state["seeded"] for state in states):
            return self._first_basis(grad, left, right, states, due, reduction)
        return lowrank.refresh_basis(grad, left, right, self.beta1, reduction) if due else right

    def _first_basis(
        self,
        grad: Tensor | Stack,
        left: Tensor,
        right: Tensor,
        states: Sequence[State],
        due: bool,
        reduction: Reduction,
    ) -> Tensor:
        """Basis of a step before which some matrices had none: a matrix gets one with its first non-zero gradient."""
        if not has_values(right):
            for state in states:
                state["seeded"] = 1
            return lowrank.refresh_basis(grad, left, right, self.beta1, reduction)
        without = ~lowrank.any_nonzero(right)
        shown = reduction.any(grad.any() if isinstance(grad, Stack) else lowrank.any_nonzero(grad))
        if not due and not (without & shown).any():
            return right
        new_right = lowrank.refresh_basis(grad, left, right, self.beta1, reduction)
        if not due:
            new_right = torch.where(without, new_right, right)
        seeded = iter(lowrank.any_nonzero(new_right).flatten().tolist())
        for state in states:
            (basis,) = self.bases([state])
            matrices = basis.shape[0] if basis.dim() == 3 else 1
            state["seeded"] = int(sum(islice(seeded, matrices)) == matrices)
        return new_right
