"""SCALE: gradients divided by the norms of their columns, and momentum in the last layer alone.

Source: "A Minimalist Optimizer Design for LLM Pretraining", arXiv 2506.16659, and its authors' code,
github.com/OptimAI-Lab/Minimalist_LLM_Pretraining, where the norms are root mean squares.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

TINY = 1e-8


class Scale(Optimizer):
    """``W <- W - lr (M / rms(M) + weight_decay W)`` for matrices, with the root mean square over one dimension.

    Args:
        params: Groups with ``dim``, the dimension of the root mean squares: 1 for the weights of a linear layer, which
            torch stores with a row for each output, and 0 for a table. ``momentum`` is the decay of the average ``M``
            of the gradients; with 0, ``M`` is the gradient and no state is kept.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "dim": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all parameters."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            used = [param.grad for param in params]
            if group["momentum"]:
                used = [self.state[param].setdefault("exp_avg", torch.zeros_like(param)) for param in params]
                torch._foreach_lerp_(used, [param.grad for param in params], 1 - group["momentum"])
            for param, direction in zip(params, used, strict=True):
                size = direction.square().mean(dim=group["dim"], keepdim=True).sqrt_().clamp_min_(TINY)
                param.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(direction, size, value=-group["lr"])
        return loss
