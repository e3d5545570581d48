"""LoRA-Pre: momenta as low-rank regressors of the gradient, refreshed in every step (arXiv 2602.24283)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_adapm import lowrank
from lightning_adapm.momentum import Direction, FullMomentum, Momentum, State, join, split, store
from lightning_adapm.optim.adalomo import NoSecondMoment
from lightning_adapm.optim.adapm import AdaPM
from lightning_adapm.policy import rank_for
from lightning_adapm.roles import Piece
from lightning_adapm.second_moment import Denominators, ElementwiseSecondMoment, SecondMoment
from lightning_adapm.sharding import ONE_PROCESS, Reduction

VARIANTS = ("adam", "muon")
ORDERS = ("gauss_seidel", "jacobi")
APPLIES_TO = ("query", "key", "value", "attn_out", "mlp")
"""Roles whose matrices have low-rank moments; everything else is AdamW's."""

_SPREAD = 0.02
"""Standard deviation of the right factor before the first step."""
_DAMPING = 1e-6
"""Of the inverses, relative to the mean of the diagonal."""
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic iteration, by Keller Jordan."""


@dataclass(frozen=True)
class Regressor:
    """``left right``, ``(m, r)`` and ``(r, n)``, fitted to what it is given, with a memory of ``decay`` per factor.

    The right factor of a state of zero stands for a fixed, well-mixed one, so that a state can be made empty.
    """

    rank: int
    decay: float
    order: str
    prefix: str

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        *batch, m, n = shape
        return {
            f"{self.prefix}_l": like.new_zeros(*batch, m, self.rank),
            f"{self.prefix}_r": like.new_zeros(*batch, self.rank, n),
        }

    def fit(self, targets: Tensor, states: Sequence[State], reduction: Reduction) -> Tensor:
        """What the factors predicted before they saw ``targets`` ``(b, m, n)``; they are refreshed."""
        lefts, rights = ([state[f"{self.prefix}_{side}"] for state in states] for side in "lr")
        left, right = join(lefts).to(targets.dtype), join(rights).to(targets.dtype)
        start = lowrank.starting_rows(self.rank, targets.shape[-1], right) * (_SPREAD * 3**0.5)
        right = torch.where(right.any(-1, keepdim=True).any(-2, keepdim=True), right, start)
        # finite: both factors may have met one huge gradient at once, where their order is Jacobi's
        predicted = (left @ right).nan_to_num_(0.0, 0.0, 0.0)
        seen = targets @ right.mT
        reduction.rows(seen)
        new_left = torch.lerp(_over_gram(seen, right @ right.mT), left, self.decay)
        basis = new_left if self.order == "gauss_seidel" else left
        # in units of its largest entry: products of large gradients would overflow
        size = reduction.largest(basis).amax(dim=-1, keepdim=True).clamp_min(torch.finfo(basis.dtype).tiny)
        basis = basis / size
        fresh, gram = reduction.total([basis.mT @ targets, reduction.owned(basis).mT @ basis])
        new_right = torch.lerp(_over_gram(fresh.mT, gram).mT / size, right, self.decay)
        finite = new_right.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # 1e-30 may come before 1e30
        new_right = torch.where(finite, new_right, right)
        store(new_left, lefts)
        store(new_right, rights)
        return predicted


def _over_gram(rows: Tensor, gram: Tensor) -> Tensor:
    """``rows gram⁻¹``, damped, in float64: ``gram`` is as ill-conditioned as the gradient is of low rank."""
    exact = gram.double()
    level = exact.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damping = (_DAMPING * level).clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    damped = exact + damping * torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_solve(rows.double().mT, factor).mT.to(rows.dtype)


@dataclass(frozen=True)
class LowRankRegression:
    """LoRA-Pre's momentum: ``beta1 left right + (1 - beta1) grad``, with the factors of the step before.

    With ``orthogonalise`` Muon's: ``beta1 left right + grad``, made orthogonal by Newton-Schulz.
    """

    rank: int
    beta1: float
    order: str
    orthogonalise: bool = False
    name: ClassVar[str] = "regression"

    @property
    def _regressor(self) -> Regressor:
        return Regressor(self.rank, self.beta1**0.5, self.order, "exp_avg")

    def due(self, step: int) -> bool:
        return False

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        return self._regressor.make(shape, like)

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        grad = join(grads)
        if not self.orthogonalise:
            used = torch.lerp(grad, self._regressor.fit(grad, states, reduction), self.beta1)
            return Direction(split(used, grads), 1 / (1 - self.beta1**step), scratch=True, clamp=None)
        if reduction is not ONE_PROCESS:
            raise TypeError(
                "LoRAPre(variant='muon') makes whole matrices orthogonal, and processes share their rows here; use"
                " variant='adam', or DDP, which leaves every process all rows"
            )
        # a sum, not an average: what the factors are fitted to has to be of the size that they stand for
        predicted = self._regressor.fit(grad / (1 - self.beta1), states, reduction)
        used = newton_schulz(torch.add(grad, predicted, alpha=self.beta1))
        return Direction(split(used, grads), 1.0, scratch=True, clamp=None)


@dataclass(frozen=True)
class LowRankSecondMoment:
    """LoRA-Pre's: ``beta2 (left right)**2 + (1 - beta2) grad**2``, factors fitted to the gradient's absolute values."""

    rank: int
    beta2: float
    eps: float
    order: str
    elementwise: ClassVar[bool] = False

    @property
    def _regressor(self) -> Regressor:
        return Regressor(self.rank, self.beta2**0.25, self.order, "exp_avg_sq")

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        return self._regressor.make(shape, like)

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        grad = join(grads)
        predicted = self._regressor.fit(grad.abs(), states, reduction)
        # not lerp: infinity minus infinity would be NaN
        root = predicted.square_().mul_(self.beta2).add_(grad.square(), alpha=1 - self.beta2).sqrt_()
        return Denominators(split(root, grads), (1 - self.beta2**step) ** 0.5, self.eps)


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """About the nearest orthogonal matrix to each ``(b, m, n)``: singular values between 0.7 and 1.2."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    found = matrices.mT if tall else matrices
    tiny = torch.finfo(found.dtype).tiny
    found = found / found.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp_min(tiny)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found.mT if tall else found).contiguous()


class LoRAPre(AdaPM):
    """LoRA-Pre: AdamW or Muon whose moments of attention and MLP matrices are low-rank regressors.

    Args:
        params: as for :class:`~lightning_adapm.AdaPM`, whose remaining options it takes.
        lr: learning rate.
        betas: decay of the first and the second moment; of Muon's momentum the first.
        eps: added to the denominator, outside the root.
        weight_decay: decoupled weight decay.
        rank: of the factors; an int, or a float in (0, 1] for a share of the smaller dimension.
        variant: ``"adam"``, or ``"muon"``: momentum made orthogonal by Newton-Schulz, and no second moment.
        order: ``"gauss_seidel"`` refreshes the right factor with the new left one, ``"jacobi"`` both at once, as
            published; that blows up where the gradient is nearly of the factors' rank.

    Raises:
        ValueError: an option out of range; a matrix without a role.
        TypeError: in the first step, where processes share rows and ``variant`` is ``"muon"``.
    """

    unused = ("update_proj_gap", "debias", "second_moment", "momentum", "basis", "clip_threshold")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float = 0.05,
        variant: str = "adam",
        order: str = "gauss_seidel",
        **options: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be 'adam' or 'muon', but got {variant!r}")
        if order not in ORDERS:
            raise ValueError(f"order must be 'gauss_seidel' or 'jacobi', but got {order!r}")
        self.variant, self.order = variant, order
        super().__init__(params, lr, betas, eps, weight_decay, rank=rank, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "variant": self.variant, "order": self.order}

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        rank, beta1 = _rank(piece, shape, group), group["betas"][0]
        if rank is None:
            return FullMomentum(beta1)
        return LowRankRegression(rank, beta1, self.order, orthogonalise=self.variant == "muon")

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        rank, beta2 = _rank(piece, shape, group), group["betas"][1]
        if rank is None:
            return ElementwiseSecondMoment(beta2, group["eps"])
        return (
            NoSecondMoment() if self.variant == "muon" else LowRankSecondMoment(rank, beta2, group["eps"], self.order)
        )


def _rank(piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> int | None:
    """Of a piece's factors; None for what is AdamW's."""
    if piece.role not in APPLIES_TO or len(shape) < 2:
        return None
    rank = rank_for(group["rank"], shape)
    return rank if rank * sum(shape[-2:]) < shape[-2:].numel() else None
