"""LoRA-Pre's step by kernels: regressors are fitted to gradients where they lie, and predict where parameters move.

Products are of float32's precision but for the last bits, because factors of a gradient of low rank are of any size and
cancel each other.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.moments.base import Direction
from lightning_adapm.moments.regression import Fitting, LowRankRegression, LowRankSecondMoment, fit
from lightning_adapm.moments.second import bias_correction
from lightning_adapm.sharding.reduction import ONE_PROCESS
from lightning_adapm.step import kernels, reading
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.moves import Divisors
from lightning_adapm.step.reading import Arithmetic


class _Targets:
    """Gradients, or their absolute values, that kernels multiply in float32's precision."""

    def __init__(self, grads: DeviceGradients, absolute: bool) -> None:
        self._grads, self._arithmetic = grads, Arithmetic(exact=True, absolute=absolute)

    def __matmul__(self, columns: Tensor) -> Tensor:
        rows = Matrices.of([columns.mT.contiguous()])
        product = self._grads.read(rows, self._arithmetic)
        return self._grads.without_flaws(product[..., : columns.shape[-1]])

    def __rmatmul__(self, weights: Tensor) -> Tensor:
        return reading.combine(self._grads.matrices, weights.mT, self._grads.reading.flaws, self._arithmetic)


class FittedDivisors(NamedTuple):
    """Divisors of a step that are computed again for a monitor, some rows at a time."""

    grads: DeviceGradients
    divisors: Divisors

    def rows(self, index: int, which: int, span: slice) -> Tensor:
        """Compute the divisors of some rows of one of the matrices that the gradient with this ``index`` stacks."""
        roots, grad = self.divisors, self.grads[index]
        assert roots.factors is not None and roots.beta2 is not None
        left, right = roots.factors
        place = index * (len(grad) if grad.dim() == 3 else 1) + which
        rows = (grad[which] if grad.dim() == 3 else grad)[span].float()
        rows = torch.where(self.grads.reading.flaws[index] == 0, rows, 0.0)
        fitted = left[place, span, : right.shape[0]] @ right.tensors[0][place]
        root = (roots.beta2 * fitted.square() + (1 - roots.beta2) * rows.square()).sqrt_()
        return root / roots.correction + roots.eps


def step(batch: Batch, grads: DeviceGradients) -> tuple[Direction, Divisors]:
    """Fit regressors to gradients, and return the direction and its divisors by the factors of before."""
    first, second, number = batch.parts[0].first, batch.parts[0].second, batch.step
    assert isinstance(first, LowRankRegression) and isinstance(second, LowRankSecondMoment)
    regressors = (first.regressor, False), (second.regressor, True)
    fittings = [
        Fitting(each, _Targets(grads, absolute), batch.parts, *each.factors(batch.parts, torch.float32))
        for each, absolute in regressors
    ]
    width = kernels.padded(first.rank)
    left, root_left = (pad(each.left, (0, width - first.rank)) for each in fittings)  # copies
    fit(fittings, ONE_PROCESS)
    right, root_right = (each.right for each in fittings)
    # (1 - beta1) (gradient + beta1 / (1 - beta1) left right)
    left *= first.beta1 / (1 - first.beta1)
    direction = Direction(grads, first.scale(number), scratch=False, clamp=None, factors=(left, right))
    correction = bias_correction(second.beta2, number)
    factors = root_left, Matrices.of([root_right])
    return direction, Divisors(None, correction, second.eps, second.beta2, factors=factors)
