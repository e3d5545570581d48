"""LoRA-Pre as a transcription of its paper has it: a step uses the factors that this step's gradient has updated."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.trials import fields_of
from lightning_adapm import LoRAPre
from lightning_adapm.moments.base import Momentum, SecondMoment, State
from lightning_adapm.moments.regression import LowRankRegression, LowRankSecondMoment, Regressor
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.reduction import Reduction

MOMENTS = ("first", "second")


class UpdatedRegressor(Regressor):
    """A regressor that predicts with the factors fitted to the targets of this step."""

    def predict_and_fit(self, targets: Tensor, states: Sequence[State], reduction: Reduction) -> Tensor:
        super().predict_and_fit(targets, states, reduction)
        left, right = self.factors(states, targets.dtype)
        return (left @ right).nan_to_num_(0.0, 0.0, 0.0)


class UpdatedMomentum(LowRankRegression):
    """``beta1 left right + (1 - beta1) grad`` with the new factors, so that the gradient is in both terms."""

    @property
    def regressor(self) -> Regressor:
        return UpdatedRegressor(**fields_of(super().regressor))


class UpdatedSecondMoment(LowRankSecondMoment):
    """``beta2 (left right)**2 + (1 - beta2) grad**2`` with the new factors."""

    @property
    def regressor(self) -> Regressor:
        return UpdatedRegressor(**fields_of(super().regressor))


class UpdatedLoRAPre(LoRAPre):
    """LoRA-Pre with updated factors.

    Args:
        moments: Those that use them, of :data:`MOMENTS`.
    """

    def __init__(self, params: Any, *, moments: Iterable[str] = MOMENTS, **options: Any) -> None:
        self.moments = frozenset(moments)
        super().__init__(params, **options)

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        momentum = super().momentum_for(piece, shape, group)
        if "first" in self.moments and isinstance(momentum, LowRankRegression):
            return UpdatedMomentum(**fields_of(momentum))
        return momentum

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        second = super().second_moment_for(piece, shape, group)
        if "second" in self.moments and isinstance(second, LowRankSecondMoment):
            return UpdatedSecondMoment(**fields_of(second))
        return second
