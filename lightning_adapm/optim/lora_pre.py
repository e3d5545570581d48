"""LoRA-Pre: momenta as low-rank regressors of the gradient, refreshed in every step (arXiv 2602.24283)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.first import FullMomentum
from lightning_adapm.moments.orthogonal import Orthogonal
from lightning_adapm.moments.policy import rank_for
from lightning_adapm.moments.regression import LowRankRegression, LowRankSecondMoment
from lightning_adapm.moments.second import ElementwiseSecondMoment
from lightning_adapm.optim.adapm import AdaPM
from lightning_adapm.roles.piece import Piece

VARIANTS = ("adam", "muon")
ORDERS = ("gauss_seidel", "jacobi")
APPLIES_TO = ("query", "key", "value", "attn_out", "mlp")
"""Roles whose matrices have low-rank moments; everything else is AdamW's."""


class LoRAPre(AdaPM):
    """LoRA-Pre: AdamW or Muon whose moments of attention and MLP matrices are low-rank regressors.

    Args:
        params: as for :class:`~lightning_adapm.AdaPM`, whose remaining options it takes.
        lr: learning rate.
        betas: decay of the first and the second moment; of Muon's momentum the first.
        eps: added to the denominator, outside the root.
        weight_decay: decoupled weight decay.
        rank: of the factors; an int, or a float in (0, 1] for a share of the smaller dimension.
        variant: ``"adam"``, or ``"muon"``: momentum made orthogonal by Newton-Schulz, times
            ``0.2 * sqrt(max(m, n))``, and no second moment.
        order: ``"gauss_seidel"`` refreshes the right factor with the new left one, ``"jacobi"`` both at once, as
            published; that blows up where the gradient is nearly of the factors' rank.

    Raises:
        ValueError: an option out of range; a matrix without a role.
    """

    unused = ("update_proj_gap", "debias", "second_moment", "momentum", "basis", "clip_threshold")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        rank: int | float = 0.05,
        variant: str = "adam",
        order: str = "gauss_seidel",
        **options: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be 'adam' or 'muon', but got {variant!r}")
        if order not in ORDERS:
            raise ValueError(f"order must be 'gauss_seidel' or 'jacobi', but got {order!r}")
        self.variant, self.order = variant, order
        super().__init__(params, lr, betas, eps, weight_decay, rank=rank, **options)

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        rank, beta1 = _rank(piece, shape, group), group["betas"][0]
        if rank is None:
            return FullMomentum(beta1)
        return LowRankRegression(rank, beta1, self.order, summed=self.variant == "muon")

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        rank, beta2 = _rank(piece, shape, group), group["betas"][1]
        if rank is None:
            return ElementwiseSecondMoment(beta2, group["eps"])
        return Orthogonal() if self.variant == "muon" else LowRankSecondMoment(rank, beta2, group["eps"], self.order)


def _rank(piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> int | None:
    """Of a piece's factors; None for what is AdamW's."""
    if piece.role not in APPLIES_TO or len(shape) < 2:
        return None
    rank = rank_for(group["rank"], shape)
    return rank if rank * sum(shape[-2:]) < shape[-2:].numel() else None
