"""Orthogonalization of matrices by Newton-Schulz iteration (Muon)."""

import torch
from torch import Tensor

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic iteration, by Keller Jordan."""


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
