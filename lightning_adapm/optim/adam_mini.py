"""Adam-mini: AdamW with one second moment per block of parameters."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lightning_adapm.optim.adapm import AdaPM


class AdamMini(AdaPM):
    """Adam-mini (arXiv 2406.16793): AdaPM's machinery with full momentum and the block second moment.

    The same updates as the package ``adam_mini`` 1.1.1, whose defaults it has, with heads and roles found as by
    :class:`~lightning_adapm.AdaPM`, whose other options it takes.

    Args:
        params: as for AdaPM.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the denominator, outside the root.
        weight_decay: decoupled weight decay.
        no_decay: roles exempt from it.

    Raises:
        ValueError: an option out of range; a query or key whose heads are not known; a matrix without a role.
        TypeError: parameters without names or roles; complex parameters.
    """

    unused = ("rank", "update_proj_gap", "debias", "basis", "clip_threshold")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_decay: Iterable[str] = ("norm", "bias"),
        **options: Any,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, momentum="full", second_moment="block", no_decay=no_decay, **options
        )
