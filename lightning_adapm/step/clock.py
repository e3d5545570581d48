"""Numbers that change from step to step, whatever the gradients are."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.first import FullMomentum, LowRankMomentum, NoMomentum
from lightning_adapm.moments.nesterov import NesterovLowRankMomentum, NesterovMomentum
from lightning_adapm.moments.orthogonal import Orthogonal, scale_of
from lightning_adapm.moments.regression import LowRankRegression, LowRankSecondMoment
from lightning_adapm.moments.second import (
    BlockSecondMoment,
    ElementwiseSecondMoment,
    FactoredSecondMoment,
    NoSecondMoment,
    RelativeSecondMoment,
    bias_correction,
)
from lightning_adapm.step.launch import pinned
from lightning_adapm.step.parts import Part

_MOMENTA = (NoMomentum, FullMomentum, LowRankMomentum)
_CORRECTED = (BlockSecondMoment, ElementwiseSecondMoment, FactoredSecondMoment)
_SECOND_MOMENTS = (*_CORRECTED, NoSecondMoment, RelativeSecondMoment)


class Clock(NamedTuple):
    """Numbers of one step for parts that step together; kernels of recorded steps read them from the device."""

    lr: float
    step: float
    """Number of the step. Exact: steps are counted in float32."""
    first: float
    """Adam's correction of the first moment, ``1 - beta1**t``."""
    scale: float
    """Factor of the direction before the second moment divides it: the correction of a full average, or that of a
    regression with the share of the gradient.
    """
    second: float
    """Correction of the roots of the second moment."""
    beta2: float = 0.0
    """Decay of the second moment, where it is another one in every step."""

    @classmethod
    def of(cls, part: Part, step: int, lr: float) -> "Clock":
        """The numbers for a part, whose moments have ``beta1`` and ``beta2``, if any."""
        momentum, second_moment = part.first, part.second
        first = 1 - momentum.beta1**step if isinstance(momentum, FullMomentum | LowRankMomentum) else 1.0
        if isinstance(momentum, LowRankRegression) and isinstance(second_moment, LowRankSecondMoment):
            return cls(lr, float(step), first, momentum.scale(step), bias_correction(second_moment.beta2, step))
        if isinstance(second_moment, Orthogonal):
            return cls(lr, float(step), first, scale_of(part.shape), 1.0)
        scale = 1 / first if isinstance(momentum, FullMomentum) else 1.0
        if isinstance(second_moment, RelativeSecondMoment):
            return cls(lr, float(step), first, scale, 1.0, 1 - second_moment.weight(step))
        second = bias_correction(second_moment.beta2, step) if isinstance(second_moment, _CORRECTED) else 1.0
        return cls(lr, float(step), first, scale, second)

    def on(self, device: torch.device) -> Tensor:
        """A copy on a device, which no step waits for."""
        return pinned(self, torch.float32, device).to(device, non_blocking=True)


def is_clocked(part: Part) -> bool:
    """Whether a clock shows all that changes from step to step in the kernels of a part's moments."""
    if type(part.second) is Orthogonal:
        return type(part.first) in (*_MOMENTA, NesterovMomentum, NesterovLowRankMomentum)
    if type(part.first) is LowRankRegression:
        return type(part.second) is LowRankSecondMoment
    return type(part.first) in _MOMENTA and type(part.second) in _SECOND_MOMENTS
