"""Adam-mini: AdamW with one second moment per block of parameters."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments import policy
from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.first import FullMomentum
from lightning_adapm.optim import options
from lightning_adapm.optim.base import RoleOptimizer
from lightning_adapm.roles.assign import check_heads
from lightning_adapm.roles.context import Named
from lightning_adapm.roles.piece import Piece


class AdamMini(RoleOptimizer):
    """Adam-mini (arXiv 2406.16793): full momentum, and one second moment per head, output row or tensor.

    The updates and defaults are those of the package ``adam_mini`` 1.1.1. Heads and roles are found as by
    :class:`~lightning_adapm.AdaPM`.

    Args:
        params: Named parameters or parameter groups, as for AdaPM.
        lr: Learning rate.
        betas: Decay of the first and the second moment.
        eps: Constant added to the denominator, outside the root.
        weight_decay: Decoupled weight decay.
        roles: Roles for names, ``{regular expression: role or policy}``, searched in order before any built-in rule.
        unmatched: ``"error"`` refuses matrices whose role is not found; any policy gives them one value per output row.
        no_decay: Roles exempt from weight decay.
        state_dtype: Dtype of the momentum, as for AdaPM. Default float32 (float64 for float64 parameters).
        maximize: Whether the objective is maximized.
        rounding: How bfloat16 and float16 parameters are rounded, ``"stochastic"`` or ``"nearest"``, as for AdaPM.
        update_in_backward: Whether parameters move inside backward, as for AdaPM.

    Raises:
        ValueError: An option is out of range, a matrix has no role, or the heads of a query or key are unknown.
        TypeError: Parameters lack names and roles, or are complex.

    State of a parameter whose matrix is ``(m, n)``; a fused weight has the entries per piece, ``query.exp_avg``:

    - ``step``: number of steps, a float32 scalar on the CPU.
    - ``exp_avg`` ``(m, n)``: momentum, in ``state_dtype``. For int8, codes and scales take its place, as in AdaPM.
    - ``exp_avg_sq``, float32: mean square of a block, ``(heads, 1)`` of queries and keys, ``(m, 1)`` of other matrices,
      ``()`` of vectors; of a bias ``(m,)``, elementwise. float64 for float64 parameters.

    Numerics: arithmetic is in float32, or float64 for float64 parameters. CUDA kernels read gradients in their own
    dtype and sum in float32.

    Example::

        optimizer = AdamMini(model.named_parameters(), lr=1e-3, weight_decay=0.1)
    """

    structure = ("state_dtype",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        roles: Mapping[str, str] | None = None,
        unmatched: str = "error",
        no_decay: Iterable[str] = ("norm", "bias"),
        state_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
        rounding: str = "stochastic",
        update_in_backward: bool = False,
        **left_over: Any,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "no_decay": no_decay,
                "state_dtype": options.dtype_name(state_dtype),
                "maximize": maximize,
                "rounding": rounding,
            },
            roles=roles,
            unmatched=unmatched,
            update_in_backward=update_in_backward,
            left_over=left_over,
            roles_matter=False,
        )

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        """Choose full momentum."""
        return FullMomentum(group["betas"][0], policy.storage_for(FullMomentum.name, group["state_dtype"], shape))

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        """Choose one value per block; elementwise for a bias."""
        return policy.second_moment_for(piece, shape, {**group, "second_moment": "block"})

    def check_pieces(self, item: Named, pieces: tuple[Piece, ...], group: Mapping[str, Any]) -> None:
        """Refuse queries and keys where it is not known which rows are a head's."""
        check_heads(item, pieces)
