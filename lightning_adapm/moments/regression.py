"""Moments as low-rank regressors of the gradient, refreshed in every step (LoRA-Pre, arXiv 2602.24283)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.base import Denominators, Direction, Momentum, SecondMoment, State
from lightning_adapm.moments.batches import join, split
from lightning_adapm.moments.lowrank import Multiplied
from lightning_adapm.moments.storage import EXACT, Entry, Storage
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction

_SPREAD = 0.02
"""Standard deviation of the right factor before the first step."""
_DAMPING = 1e-6
"""Damping of the inverses, relative to the mean of the diagonal."""
_ADDED_APART = 1024
"""Columns whose products are added up apart from those of others, because Gram matrices have too few entries to occupy
a GPU.
"""


@dataclass(frozen=True)
class Regressor:
    """Factors ``(m, r)`` and ``(r, n)`` fitted to targets, with a memory of ``decay`` per factor.

    A right factor of zero, as in an empty state, stands for a fixed, well-mixed one.
    """

    rank: int
    decay: float
    order: str
    prefix: str
    storage: Storage = EXACT

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        *batch, m, n = shape
        return {
            f"{self.prefix}_l": Entry(torch.Size((*batch, m, self.rank)), rows=True, storage=self.storage),
            f"{self.prefix}_r": Entry(torch.Size((*batch, self.rank, n)), storage=self.storage),
        }

    def predict_and_fit(self, targets: Tensor, states: Sequence[State], reduction: Reduction) -> Tensor:
        """Predict ``targets`` ``(b, m, n)`` with the factors, then fit the factors to them."""
        left, right = self.factors(states, targets.dtype)
        predicted = left @ right
        if self.order == "jacobi":  # both factors may have met one huge gradient at once
            predicted.nan_to_num_(0.0, 0.0, 0.0)
        fit([Fitting(self, targets, states, left, right)], reduction)
        return predicted

    def factors(self, states: Sequence[State], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factors ``(b, m, r)`` and ``(b, r, n)``, which may be the state's own memory."""
        left, right = (join(self.storage.read(states, f"{self.prefix}_{side}")).to(dtype) for side in "lr")
        start = lowrank.kept_starting_rows(self.rank, right.shape[-1], right) * (_SPREAD * 3**0.5)
        return left, torch.where(right.any(-1, keepdim=True).any(-2, keepdim=True), right, start)

    def write(self, states: Sequence[State], left: Tensor, right: Tensor) -> None:
        """Store :meth:`factors`."""
        for side, fitted in (("l", left), ("r", right)):
            key = f"{self.prefix}_{side}"
            self.storage.write(states, key, split(fitted, self.storage.read(states, key)))


class Fitting(NamedTuple):
    """A regressor with its factors and their targets."""

    regressor: Regressor
    targets: Multiplied
    """``(b, m, n)``."""
    states: Sequence[State]
    left: Tensor
    right: Tensor


def fit(fittings: Sequence[Fitting], reduction: Reduction) -> None:
    """Fit factors to their targets, of several regressors of one shape and order together.

    The many operations on small matrices take a GPU as long for one regressor as for two.
    """
    rights = _joined([each.right for each in fittings])
    seen = _joined([each.targets @ each.right.mT for each in fittings])
    reduction.rows(seen)
    new_lefts = _averaged(_over_gram(seen, _gram(rights)), [each.left for each in fittings], fittings)
    del seen
    gauss_seidel = fittings[0].regressor.order == "gauss_seidel"
    basis = new_lefts if gauss_seidel else _joined([each.left for each in fittings])
    # in units of its largest entry: products of large gradients would overflow
    size = reduction.largest(basis).amax(dim=-1, keepdim=True).clamp_min(torch.finfo(basis.dtype).tiny)
    basis = basis / size
    rows = basis.mT.chunk(len(fittings))
    fresh = _joined([own @ each.targets for own, each in zip(rows, fittings, strict=True)])
    fresh, gram = reduction.total([fresh, _gram(reduction.owned(basis).mT)])
    new_rights = _averaged(_over_gram(fresh.mT, gram).mT / size, [each.right for each in fittings], fittings)
    finite = new_rights.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # 1e-30 may come before 1e30
    new_rights = torch.where(finite, new_rights, rights)
    fitted = zip(*(new.chunk(len(fittings)) for new in (new_lefts, new_rights)), strict=True)
    for each, (left, right) in zip(fittings, fitted, strict=True):
        each.regressor.write(each.states, left, right)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _averaged(new: Tensor, before: list[Tensor], fittings: Sequence[Fitting]) -> Tensor:
    """Average the ``new`` factors with those of before, in place."""
    for own, old, each in zip(new.chunk(len(fittings)), before, fittings, strict=True):
        torch.lerp(own, old, each.regressor.decay, out=own)
    return new


def _gram(rows: Tensor) -> Tensor:
    """``rows rowsᵀ`` of ``(b, r, n)``, added up in float64."""
    n = rows.shape[-1]
    width, parts = min(n, _ADDED_APART), max(1, -(-n // _ADDED_APART))
    whole = pad(rows, (0, parts * width - n)) if parts * width > n else rows
    apart = whole.unflatten(-1, (parts, width)).transpose(1, 2)
    exact = apart.to(torch.float64, memory_format=torch.contiguous_format).flatten(0, 1)
    return (exact @ exact.mT).unflatten(0, (-1, parts)).sum(dim=1).to(rows.dtype)


def _over_gram(rows: Tensor, gram: Tensor) -> Tensor:
    """Damped ``rows gram⁻¹`` in float64, because a gradient of low rank makes ``gram`` ill-conditioned."""
    exact = gram.double()
    level = exact.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damping = (_DAMPING * level).clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
    identity = torch.eye(gram.shape[-1], dtype=torch.float64, device=gram.device)
    damped = exact + damping * identity
    factor, _ = torch.linalg.cholesky_ex(damped)
    # of the small matrix alone: solving for all rows takes a GPU many times longer than a product
    half = lowrank.inverted(factor)
    return (rows.double() @ (half.mT @ half)).to(rows.dtype)


@dataclass(frozen=True)
class LowRankRegression(Momentum):
    """LoRA-Pre's momentum: ``beta1 left right + (1 - beta1) grad``, with the factors of the step before.

    With ``summed`` it is that of the Muon variant: ``beta1 left right + grad``, with factors of the size of
    ``grad / (1 - beta1)``.
    """

    rank: int
    beta1: float
    order: str
    summed: bool = False
    storage: Storage = EXACT
    name: ClassVar[str] = "regression"
    keys: ClassVar[frozenset[str]] = frozenset({"exp_avg_l", "exp_avg_r"})

    @property
    def regressor(self) -> Regressor:
        """The regressor of gradients."""
        return Regressor(self.rank, self.beta1**0.5, self.order, "exp_avg", self.storage)

    def scale(self, step: int) -> float:
        """Share of the gradient in the direction, with the correction of its bias."""
        return (1 - self.beta1) / (1 - self.beta1**step)

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        return self.regressor.entries(shape)

    @classmethod
    def fits(cls, saved: Mapping[str, Any], shape: torch.Size) -> bool:
        return lowrank.are_factors(saved["exp_avg_l"], saved["exp_avg_r"], shape)

    @classmethod
    def dense(cls, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
        return saved["exp_avg_l"].float() @ saved["exp_avg_r"].float()

    def from_dense(self, dense: Tensor, state: dict[str, Any]) -> None:
        targets = dense / (1 - self.beta1) if self.summed else dense  # what gradients were to be
        self._fill(state, *lowrank.factorized(targets, self.rank))

    def resized(self, saved: Mapping[str, Any], state: dict[str, Any]) -> bool:
        self._fill(state, *lowrank.resized(saved["exp_avg_l"], saved["exp_avg_r"], self.rank))
        return True

    def _fill(self, state: dict[str, Any], left: Tensor, right: Tensor) -> None:
        self.storage.write([state], "exp_avg_l", [left])
        self.storage.write([state], "exp_avg_r", [right])

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        grad = join(grads)
        if not self.summed:
            used = torch.lerp(grad, self.regressor.predict_and_fit(grad, states, reduction), self.beta1)
            return Direction(split(used, grads), 1 / (1 - self.beta1**step), scratch=True, clamp=None)
        # a sum, not an average: what the factors are fitted to has to be of the size that they stand for
        predicted = self.regressor.predict_and_fit(grad / (1 - self.beta1), states, reduction)
        used = torch.add(grad, predicted, alpha=self.beta1)
        return Direction(split(used, grads), 1.0, scratch=True, clamp=None)


@dataclass(frozen=True)
class LowRankSecondMoment(SecondMoment):
    """LoRA-Pre's: ``beta2 (left right)**2 + (1 - beta2) grad**2``, factors fitted to the gradient's absolute values."""

    rank: int
    beta2: float
    eps: float
    order: str
    storage: Storage = EXACT
    keys: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq_l", "exp_avg_sq_r"})

    @property
    def regressor(self) -> Regressor:
        """The regressor of absolute values."""
        return Regressor(self.rank, self.beta2**0.25, self.order, "exp_avg_sq", self.storage)

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        return self.regressor.entries(shape)

    @classmethod
    def fits(cls, saved: Mapping[str, Any], shape: torch.Size) -> bool:
        return lowrank.are_factors(saved["exp_avg_sq_l"], saved["exp_avg_sq_r"], shape)

    @classmethod
    def dense(cls, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
        root: Tensor = saved["exp_avg_sq_l"] @ saved["exp_avg_sq_r"]
        return root.square()

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        grad = join(grads)
        predicted = self.regressor.predict_and_fit(grad.abs(), states, reduction)
        # not lerp: infinity minus infinity would be NaN
        root = predicted.square_().mul_(self.beta2).add_(grad.square(), alpha=1 - self.beta2).sqrt_()
        return Denominators(split(root, grads), (1 - self.beta2**step) ** 0.5, self.eps)
