"""AdaPM's variants that are only tried: other momenta of the low-rank kind, and what is made of their directions."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from benchmarks.studies import damping
from lightning_adapm import AdaPM
from lightning_adapm.moments import lowrank
from lightning_adapm.moments.base import Direction, Momentum, State
from lightning_adapm.moments.batches import Stack, join, split
from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.moments.storage import Entry
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.parts import Part
from lightning_adapm.step.paths import Path

KEYS = "exp_avg_l", "exp_avg_r"


def fields_of(instance: Any) -> dict[str, Any]:
    """Fields of a dataclass by name, from which one of a subclass is made."""
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


class Trial(AdaPM):
    """AdaPM with another low-rank momentum.

    Args:
        low_rank: Fields of :class:`LowRankMomentum` that differ, for instance ``{"flush": False}``.
        divide_all: Adam's bias correction of the whole direction, as published, not of the average alone.
        slow_beta1: Decay of a second low-rank momentum; the mean of both is used.
        method: Method of the low-rank momentum, a name in :data:`LOW_RANK`.
        residual: Factor of the gradient outside the subspace, or ``"matched"``: see :class:`Scaled`.
        scale: Factor of the whole direction by policy; ``residual`` and these make updates smaller.
        bounds: Factor of ``clip_threshold`` by role, where momentum is low-rank.
        damping: Factor of the square of what no momentum averages, which joins the second moment in the denominator:
            see :func:`benchmarks.studies.damping.move`.
    """

    def __init__(
        self,
        params: Any,
        *,
        low_rank: Mapping[str, Any] | None = None,
        divide_all: bool = False,
        slow_beta1: float | None = None,
        method: str | None = None,
        residual: float | str = 1.0,
        scale: Mapping[str, float] | None = None,
        bounds: Mapping[str, float] | None = None,
        damping: float = 0.0,
        **options: Any,
    ) -> None:
        self.low_rank, self.divide_all, self.slow_beta1 = dict(low_rank or {}), divide_all, slow_beta1
        self.method, self.residual, self.scale = method, residual, dict(scale or {})
        self.bounds, self.damping = dict(bounds or {}), damping
        super().__init__(params, **options)

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        momentum = super().momentum_for(piece, shape, group)
        scale = self.scale.get(momentum.name, 1.0)
        if isinstance(momentum, LowRankMomentum):
            momentum = self._tried(dataclasses.replace(momentum, **self.low_rank))
            if piece.role in self.bounds:
                return Bounded(**fields_of(momentum), clamp=self.bounds[piece.role])
            if self.residual != 1:
                return scaled(momentum, scale, self.residual)
        return momentum if scale == 1 else scaled(momentum, scale)

    def _damps(self, part: Part) -> bool:
        return self.damping > 0 and part.first.name != "full"

    def path_for(self, parts: Sequence[Part], grads: Sequence[Tensor], group: Mapping[str, Any]) -> Path:
        return Path("torch", "damped") if self._damps(parts[0]) else super().path_for(parts, grads, group)

    def move(self, batch: Batch, group: Mapping[str, Any]) -> None:
        if self._damps(batch.parts[0]):
            damping.move(batch, group, self.damping)
        else:
            super().move(batch, group)

    def _tried(self, momentum: LowRankMomentum) -> Momentum:
        if self.divide_all:
            return DivideAll(**fields_of(momentum))
        if self.method is not None:
            return LOW_RANK[self.method](**fields_of(momentum))
        if self.slow_beta1 is not None:
            return TwoTimeScales(momentum, dataclasses.replace(momentum, beta1=self.slow_beta1))
        return momentum


@dataclass(frozen=True)
class Bounded(LowRankMomentum):
    """Low-rank momentum with a bound of its own."""

    clamp: float = 1.0  # type: ignore[misc]


@dataclass(frozen=True)
class Scaled(Momentum):
    """A momentum whose direction is multiplied by ``scale``, and by ``residual`` what its subspace does not see.

    ``"matched"``: by how much averaging makes the part that it does see smaller, as if the rest were as noisy.
    """

    inner: Momentum
    scale: float
    residual: float | str = 1.0

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    def due(self, step: int) -> bool:
        return self.inner.due(step)

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        return self.inner.entries(shape)

    def make(self, shape: torch.Size, like: Tensor, kept: tuple[int, int] | None = None) -> dict[str, Any]:
        return self.inner.make(shape, like, kept)

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        used = self.inner.direction(grads, states, step, reduction)
        if self.residual != 1:
            left, right = (join([state[key] for state in states]).to(grads[0].dtype) for key in KEYS)
            grad = join(grads)
            projected = grad @ right.mT
            reduction.rows(projected)
            outside = torch.baddbmm(grad, projected, right, alpha=-1)
            less = (1 - self._factor(projected, left, step)) * outside
            tensors = torch._foreach_sub(used.multiplied().tensors, split(less, grads))
            used = used._replace(tensors=list(tensors), scratch=True, factors=None)
        return used._replace(scale=used.scale * self.scale)

    def _factor(self, projected: Tensor, left: Tensor, step: int) -> Tensor | float:
        """``residual`` as a number, or one per matrix; ``projected`` is what the subspace sees of the gradient."""
        if not isinstance(self.residual, str):
            return self.residual
        assert isinstance(self.inner, LowRankMomentum) and self.residual == "matched"
        averaged = torch.linalg.matrix_norm(left, keepdim=True) / (1 - self.inner.beta1**step)
        size = torch.linalg.matrix_norm(projected, keepdim=True)
        return (averaged / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_max(1.0)


def scaled(inner: Momentum, scale: float, residual: float | str = 1.0) -> Momentum:
    return cast(Momentum, Scaled(inner, scale, residual))  # whose name is not its class's


@dataclass(frozen=True)
class Solved(LowRankMomentum):
    """The basis of a refresh is solved for, not one iteration towards it."""

    def _next_basis(
        self,
        grad: Tensor | Stack,
        left: Tensor,
        right: Tensor,
        states: Sequence[State],
        step: int,
        reduction: Reduction,
    ) -> Tensor:
        grad = join(grad) if isinstance(grad, Stack) else grad
        shipped = super()._next_basis(grad, left, right, states, step, reduction)
        if shipped is right:
            return right
        return self._solve(average(grad, left, right, self.beta1), left, right, shipped)

    def _solve(self, mean: Tensor, left: Tensor, right: Tensor, shipped: Tensor) -> Tensor:
        """The basis for the momentum ``mean``, from the factors before and the basis that AdaPM finds."""
        raise NotImplementedError


@dataclass(frozen=True)
class ExactSVD(Solved):
    """The basis is the first right singular vectors of ``M~``."""

    def _solve(self, mean: Tensor, left: Tensor, right: Tensor, shipped: Tensor) -> Tensor:
        exact = leading_rows(mean, right.shape[-2])
        return torch.where(lowrank.any_nonzero(shipped), exact, shipped)


@dataclass(frozen=True)
class GradientDescent(Solved):
    """The basis follows from a few steps of gradient descent on ``|M~ - L R|**2``, warm-started, as in the paper.

    The steps have the length 1 / (largest eigenvalue of the other factor's Gram matrix); then R is orthonormalized.
    """

    iterations: ClassVar[int] = 5

    def _solve(self, mean: Tensor, left: Tensor, right: Tensor, shipped: Tensor) -> Tensor:
        warm = lowrank.any_nonzero(right)  # before the first there is nothing to start from
        rows = torch.where(warm, right, shipped)
        loadings = torch.where(warm, left, mean @ rows.mT)
        for _ in range(self.iterations):
            error = mean - loadings @ rows
            step_left = error @ rows.mT / largest_eigenvalue(rows @ rows.mT)
            step_right = loadings.mT @ error / largest_eigenvalue(loadings.mT @ loadings)
            loadings, rows = loadings + step_left, rows + step_right
        return lowrank.orthonormal_rows(rows)


def leading_rows(matrices: Tensor, rank: int) -> Tensor:
    """The first ``rank`` right singular vectors of ``(b, m, n)`` as rows.

    By the eigenvectors of the smaller Gram matrix, in float64: on a GPU many times faster than an SVD.
    """
    exact = matrices.double()
    if matrices.shape[-2] >= matrices.shape[-1]:
        rows = torch.linalg.eigh(exact.mT @ exact).eigenvectors[..., -rank:].mT
    else:
        rows = torch.linalg.eigh(exact @ exact.mT).eigenvectors[..., -rank:].mT @ exact
    return lowrank.orthonormal_rows(rows.flip(-2).to(matrices.dtype))


def average(grad: Tensor, left: Tensor, right: Tensor, beta1: float) -> Tensor:
    """``M~ = beta1 left right + (1 - beta1) grad``, which is what the basis is for."""
    return torch.baddbmm(grad, left, right, beta=1 - beta1, alpha=beta1)


def largest_eigenvalue(gram: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(gram, 2, keepdim=True).clamp_min(torch.finfo(gram.dtype).tiny)


@dataclass(frozen=True)
class Reprojected(LowRankMomentum):
    """At a refresh the corrected momentum is projected on the new subspace: ``(1 - beta1**t) M^ R_newᵀ`` is stored."""

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        grad = join(grads)
        left, right = (join([state[key] for state in states]).to(grad.dtype) for key in KEYS)
        new_right = self._next_basis(grad, left, right, states, step, reduction)
        if new_right is right:
            return super().direction(grads, states, step, reduction)
        correction, projected = 1 - self.beta1**step, grad @ right.mT
        average = torch.lerp(left, projected, 1 - self.beta1)
        corrected = torch.baddbmm(grad, average / correction - projected, right)
        for key, batch in zip(KEYS, (correction * corrected @ new_right.mT, new_right), strict=True):
            self.storage.write(states, key, split(batch, [state[key] for state in states]))
        return Direction(split(corrected, grads), 1.0, scratch=True, clamp=1.0)


@dataclass(frozen=True)
class DivideAll(LowRankMomentum):
    """The published form: the whole direction, not only the average in it, is divided by ``1 - beta1**step``."""

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        # a step so late that nothing is left to correct, in the same phase of the refresh
        late = step + 10_000 * self.update_proj_gap
        used = super().direction(grads, states, late, reduction)
        return used._replace(scale=used.scale / (1 - self.beta1**step))


@dataclass(frozen=True)
class Prefixed:
    """The entries of a state that begin with a prefix."""

    state: State
    prefix: str

    def __getitem__(self, key: str) -> Any:
        return self.state[self.prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.state[self.prefix + key] = value


@dataclass(frozen=True)
class TwoTimeScales(Momentum):
    """The mean of two low-rank momenta, each with factors of its own."""

    fast: LowRankMomentum
    slow: LowRankMomentum
    name: ClassVar[str] = "low_rank"

    def due(self, step: int) -> bool:
        return self.fast.due(step)

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        found = {"fast.": self.fast.entries(shape), "slow.": self.slow.entries(shape)}
        return {prefix + key: entry for prefix, entries in found.items() for key, entry in entries.items()}

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        fast, slow = (
            momentum.direction(
                grads,
                [Prefixed(state, prefix) for state in states],
                step,
                reduction,
            )
            for prefix, momentum in (("fast.", self.fast), ("slow.", self.slow))
        )
        both = torch._foreach_add(fast.multiplied().tensors, slow.multiplied().tensors)
        return Direction(list(both), 0.5 * fast.scale, scratch=True, clamp=fast.clamp)


LOW_RANK: dict[str, type[LowRankMomentum]] = {
    "exact SVD": ExactSVD,
    "gradient descent": GradientDescent,
    "re-projected": Reprojected,
}
