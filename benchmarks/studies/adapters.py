"""Adapters that learn while the model stays as it is: LoRA, arXiv 2106.09685."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

SCALE = 2.0
"""Factor of the product of both matrices: ``alpha`` of twice the rank, as is usual."""


class Adapted(nn.Module):
    """A linear layer that is fixed, plus a product of two matrices that learns and begins at zero."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(linear.weight.new_empty(rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + SCALE * F.linear(F.linear(x, self.lora_A), self.lora_B)


def adapt(model: nn.Module, rank: int) -> None:
    """Fix a decoder's parameters and give every linear layer of its blocks an adapter."""
    model.requires_grad_(False)
    for module in list(model.get_submodule("blocks").modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Adapted(child, rank))
