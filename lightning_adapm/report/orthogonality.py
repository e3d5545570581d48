"""Deviation of a step's updates from orthogonal matrices, estimated from tiles of their rows."""

import torch
from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.sharding.reduction import total
from lightning_adapm.step.parts import Part

_PROBES = 32
"""Number of random vectors. The estimate is off by about 5 %."""


class Deviation:
    """``‖U Uᵀ - I‖_F / sqrt(m)`` of an update of ``m`` rows, or of ``Uᵀ U`` where it has fewer columns.

    It is the root mean square of ``σ² - 1`` over singular values. For vectors of random signs, ``(z₁ᵀ A z₂)²`` has the
    mean ``‖A‖_F²``, and the products ``zᵀ U`` and ``(U z₁)ᵀ (U z₂)`` are sums over tiles of rows. In a stack of
    matrices, squares are averaged.

    Args:
        part: An orthogonalized part, whose matrices of ``(m, n)`` this process holds wholly or in rows.
    """

    def __init__(self, part: Part) -> None:
        *stack, self._rows, n = part.shape
        self._shard, self._wide = part.shard, self._rows <= n
        self._place = 0 if part.shard is None else part.shard.first
        self._size = 0.2 * max(self._rows, n) ** 0.5
        like = torch.empty((), dtype=torch.float32, device=part.view.device)
        side = min(self._rows, n)
        self._vectors = lowrank.starting_rows(_PROBES, side, like).sign()
        count = torch.Size(stack if part.shard is not None else part.held_shape[:-2]).numel()
        self._sums = like.new_zeros(count, _PROBES, n if self._wide else _PROBES)

    def see(self, rows: Tensor) -> None:
        """Take in the next rows of the update, zero where other processes hold them."""
        rows = rows.reshape(-1, rows.shape[-1]).float() / self._size
        while len(rows):
            which, first = (0, self._place) if self._shard is not None else divmod(self._place, self._rows)
            own = rows[: self._rows - first]
            if self._wide:
                self._sums[which].addmm_(self._vectors[:, first : first + len(own)], own)
            else:
                seen = own @ self._vectors.mT
                self._sums[which].addmm_(seen.mT, seen)
            self._place, rows = self._place + len(own), rows[len(own) :]

    def settle(self) -> Tensor:
        """The estimate, a scalar on the device; over all processes that share rows."""
        if self._shard is not None:
            total([self._sums], self._shard.layout.group)
        products = self._sums @ self._sums.mT if self._wide else self._sums
        products = products - self._vectors @ self._vectors.mT
        pairs = products.triu(diagonal=1).square().sum(dim=(-2, -1)) / (_PROBES * (_PROBES - 1) / 2)
        return (pairs.mean() / self._vectors.shape[-1]).sqrt()
