"""Muon's first moments: momenta that look one step ahead (Nesterov's, as in ``torch.optim.Muon``).

A plain momentum moves along the average ``B``. These move along ``(1 - mu) G + mu B``, which is the average after
another such gradient. There is no bias correction, because orthogonalization ignores the direction's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_adapm.moments.base import Direction, State
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction


@dataclass(frozen=True)
class NesterovMomentum(FullMomentum):
    """Muon's first moment: ``(1 - beta1) G + beta1 B`` with the average ``B``."""

    @property
    def share(self) -> float:
        return self.beta1

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        averages = super().direction(grads, states, step, reduction).tensors
        return Direction(list(torch._foreach_lerp(grads, averages, self.share)), 1.0, scratch=True, clamp=None)


@dataclass(frozen=True)
class NesterovLowRankMomentum(LowRankMomentum):
    """Low-rank form: ``((1 - beta1) C + beta1 L / (1 - beta1**t)) R + (G - C R)``, where ``L`` averages ``C = G Rᵀ``.

    It is the look-ahead momentum inside the subspace and the gradient outside. The average is corrected for its bias,
    so that both parts have one scale.
    """

    @property
    def share(self) -> float:
        return self.beta1

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        plain = super().direction(grads, states, step, reduction)
        assert plain.factors is not None
        left, right = plain.factors  # of what the average differs in from the gradient
        return plain._replace(factors=(self.share * left, right))
