"""PartialMuon's step in two parts: Newton-Schulz alone, and everything else."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_adapm import PartialMuon
from lightning_adapm.moments.base import SecondMoment
from lightning_adapm.moments.orthogonal import Iteration, Orthogonal, newton_schulz
from lightning_adapm.roles.piece import Piece
from lightning_adapm.step.kernels import FACTOR
from lightning_adapm.step.newton_schulz import NORM, is_half, iterated, iterated_in_half


class Bookkeeping(PartialMuon):
    """PartialMuon without Newton-Schulz: momentum, exchanges of matrices that nothing hides, moves of parameters."""

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        found = super().second_moment_for(piece, shape, group)
        return Orthogonal(Iteration(())) if isinstance(found, Orthogonal) else found


class NewtonSchulzAlone(PartialMuon):
    """Newton-Schulz of as many random matrices as a process orthogonalizes in PartialMuon's step.

    All of one shape are orthogonalized together, which is the fastest. What PartialMuon's step takes longer is the cost
    of everything else, exchanges that are not hidden and smaller batches included.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for matrices, iteration in self._matrices:
            if matrices.device.type != "cuda":
                newton_schulz(matrices, iteration)
            elif matrices.dtype == torch.float16:
                iterated_in_half(matrices, iteration)
            else:
                iterated(matrices, iteration)

    @cached_property
    def _matrices(self) -> list[tuple[Tensor, Iteration]]:
        """Matrices of each shape, in the dtype of products and of the norm that it asks for; and their iteration."""
        numbers: Counter[tuple[torch.Size, Iteration, int]] = Counter()
        for part in (part for group in self.param_groups for param in group["params"] for part in self.parts(param)):
            if isinstance(part.second, Orthogonal):
                owners = 1 if part.layout is None else len(part.layout.spans)
                numbers[part.shape[-2:], part.second.iteration, owners] += part.shape[:-2].numel()
        device = self.param_groups[0]["params"][0].device
        found = []
        for (shape, iteration, owners), number in numbers.items():
            matrices = torch.randn(-(-number // owners), *shape, device=device)
            matrices = (matrices / torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)).to(FACTOR)
            found.append(((NORM * matrices).half() if is_half(shape, FACTOR, iteration) else matrices, iteration))
        return found
