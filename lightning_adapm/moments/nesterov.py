"""Muon's first moments: momenta that look one step ahead (Nesterov's, as in ``torch.optim.Muon``).

A plain momentum moves along the average ``B``, these along ``(1 - mu) G + mu B``: what the average would be if the next
gradient were this one. There is no correction of a bias: what follows makes no use of the direction's size.
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
    """Muon's: ``(1 - beta1) G + beta1 B`` with the average ``B``."""

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        averages = super().direction(grads, states, step, reduction).tensors
        return Direction(list(torch._foreach_lerp(grads, averages, self.beta1)), 1.0, scratch=True, clamp=None)


@dataclass(frozen=True)
class NesterovLowRankMomentum(LowRankMomentum):
    """``((1 - beta1) C + beta1 L / (1 - beta1**t)) R + (G - C R)`` with what the basis sees, ``C = G Rᵀ``, averaged in
    ``L``.

    Inside the subspace the momentum that looks ahead, outside it the gradient. The average is corrected for its bias
    here, so that both parts have one scale.
    """

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        plain = super().direction(grads, states, step, reduction)
        assert plain.factors is not None
        left, right = plain.factors  # of what the average differs in from the gradient
        return plain._replace(factors=(self.beta1 * left, right))
