"""Matrices of hidden layers, whose updates PartialMuon makes orthogonal."""

import torch
from torch import nn

from lightning_adapm import PartialMuon

HIDDEN = ("q_proj", "k_proj", "v_proj", "o_proj", "mlp.0", "mlp.2")
WEIGHT = "layers.0.mlp.0.weight"


def hidden(name, param):
    return param.dim() == 2 and any(part in name for part in HIDDEN)


def one_weight(m=24, n=16, dtype=torch.float64, **options):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(m, n, dtype=dtype))
    return weight, PartialMuon([(WEIGHT, weight)], lr=1e-2, **{"state_dtype": None, "newton_schulz": "muon", **options})


def steps(weight, optimizer, count=12):
    """Gradients with a part that stays, one after the other; each is taken after it was given."""
    generator = torch.Generator().manual_seed(1)
    fixed = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    for step in range(1, count + 1):
        weight.grad = fixed + torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        yield step, weight.grad.clone()
        optimizer.step()
