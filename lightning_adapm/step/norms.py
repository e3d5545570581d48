"""Norms of gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_adapm.step.recording import Found
from lightning_adapm.step.work import Work


def norms_of(grads: list[Tensor]) -> list[Tensor]:
    """Norm of each gradient."""
    exact = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return list(torch._foreach_norm(grads, 2, dtype=exact)) if grads else []


def norms_of_step(works: Sequence[Work], found: Sequence[Found]) -> list[Tensor]:
    """Norms that make up that of a step's gradients, which are not read again where kernels have ``found`` squares."""
    squares = [each for some in found for each in some.squares]
    read = {part.key for some in found for part in some.parts}
    unread = [
        part.piece.matrix(grad)
        for work in works
        for parts, grad in zip(work.parts, work.grads, strict=True)
        for part in parts
        if part.key not in read
    ]
    # sums of squares are not negative
    return [*(torch._foreach_sqrt(torch._foreach_norm(squares, 1)) if squares else ()), *norms_of(unread)]
