"""LoRA-Pre: momenta as low-rank regressors of the gradient, refreshed in every step (arXiv 2602.24283)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.first import FullMomentum
from lightning_adapm.moments.orthogonal import Orthogonal
from lightning_adapm.moments.policy import rank_for, storage_for
from lightning_adapm.moments.regression import LowRankRegression, LowRankSecondMoment
from lightning_adapm.moments.second import ElementwiseSecondMoment
from lightning_adapm.optim import options
from lightning_adapm.optim.base import RoleOptimizer
from lightning_adapm.roles.piece import Piece

VARIANTS = ("adam", "muon")
ORDERS = ("gauss_seidel", "jacobi")
APPLIES_TO = ("query", "key", "value", "attn_out", "mlp")
"""Roles whose matrices have low-rank moments; everything else is AdamW's."""


class LoRAPre(RoleOptimizer):
    """LoRA-Pre (arXiv 2602.24283): AdamW or Muon whose moments of attention and MLP matrices are low-rank regressors.

    Args:
        params: Named parameters or parameter groups, as for :class:`~lightning_adapm.AdaPM`.
        lr: Learning rate.
        betas: Decay of the first and the second moment; the first is that of Muon's momentum.
        eps: Constant added to the denominator, outside the root.
        weight_decay: Decoupled weight decay.
        rank: Rank of the factors: an int, or a float in (0, 1] for a share of the smaller dimension.
        variant: ``"adam"``, or ``"muon"``: momentum made orthogonal by Newton-Schulz, times
            ``0.2 * sqrt(max(m, n))``, and no second moment.
        order: ``"gauss_seidel"`` refreshes the right factor with the new left one. ``"jacobi"`` refreshes both at once,
            as published; that blows up where the gradient is nearly of the factors' rank.
        roles: Roles for names, ``{regular expression: role or policy}``, searched in order before any built-in rule.
        unmatched: ``"error"`` refuses matrices whose role is not found; any policy gives them AdamW's moments.
        no_decay: Roles exempt from weight decay.
        state_dtype: Dtype of the first moment. Default float32 (float64 for float64 parameters).
        maximize: Whether the objective is maximized.
        rounding: How bfloat16 and float16 parameters are rounded, ``"stochastic"`` or ``"nearest"``, as for AdaPM.
        update_in_backward: Whether parameters move inside backward, as for AdaPM.

    A step uses the factors from before its gradient. A transcription of the paper has the updated ones, which ended
    0.03 nats lower in a small study where LoRA-Pre is 0.41 behind AdamW, with single updates up to 24 times as large.

    Raises:
        ValueError: An option is out of range, or a matrix has no role.
        TypeError: Parameters lack names and roles, or are complex.

    State of a parameter whose matrix is ``(m, n)``; a fused weight has the entries per piece, ``query.exp_avg_l``:

    - ``step``: number of steps, a float32 scalar on the CPU.
    - ``exp_avg_l`` ``(m, rank)`` and ``exp_avg_r`` ``(rank, n)``, in ``state_dtype``: factors of the momentum. For
      int8, codes and scales take their place, as in AdaPM.
    - ``exp_avg_sq_l`` ``(m, rank)`` and ``exp_avg_sq_r`` ``(rank, n)``, float32: factors fitted to ``|gradient|``; none
      for ``variant="muon"``.
    - ``exp_avg`` and ``exp_avg_sq`` ``(m, n)`` instead where a piece has AdamW's moments.

    Numerics: arithmetic is in float32, or float64 for float64 parameters; inverses are in float64. On CUDA, kernels
    read gradients and move parameters; each of their products is the sum of three in bfloat16, with a relative error of
    1e-5. For rows that processes share, ``order="jacobi"`` and ``variant="muon"``, moments are torch's
    operations on copies of gradients in float32, some at a time, and a kernel moves the parameters.

    Example::

        optimizer = LoRAPre(model.named_parameters(), lr=1e-3, rank=0.05)
    """

    structure = ("rank", "state_dtype")

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
        roles: Mapping[str, str] | None = None,
        unmatched: str = "error",
        no_decay: Iterable[str] = (),
        state_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
        rounding: str = "stochastic",
        update_in_backward: bool = False,
        **left_over: Any,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be 'adam' or 'muon', but got {variant!r}")
        if order not in ORDERS:
            raise ValueError(f"order must be 'gauss_seidel' or 'jacobi', but got {order!r}")
        self.variant, self.order = variant, order
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "no_decay": no_decay,
                "state_dtype": options.dtype_name(state_dtype),
                "maximize": maximize,
                "rounding": rounding,
            },
            roles=roles,
            unmatched=unmatched,
            update_in_backward=update_in_backward,
            left_over=left_over,
        )

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        """Choose a low-rank regressor for attention and MLP matrices, full momentum for everything else."""
        rank, beta1 = _rank(piece, shape, group), group["betas"][0]
        narrowest = shape if rank is None else torch.Size((*shape[:-1], rank))
        storage = storage_for(FullMomentum.name, group["state_dtype"], narrowest)
        if rank is None:
            return FullMomentum(beta1, storage)
        return LowRankRegression(rank, beta1, self.order, self.variant == "muon", storage)

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        """Choose the second moment that goes with the momentum."""
        rank, beta2 = _rank(piece, shape, group), group["betas"][1]
        if rank is None:
            return ElementwiseSecondMoment(beta2, group["eps"])
        return Orthogonal() if self.variant == "muon" else LowRankSecondMoment(rank, beta2, group["eps"], self.order)


def _rank(piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> int | None:
    """Rank of a piece's factors; None where it has AdamW's moments."""
    if piece.role not in APPLIES_TO or len(shape) < 2:
        return None
    rank = rank_for(group["rank"], shape)
    return rank if rank * sum(shape[-2:]) < shape[-2:].numel() else None
