"""A small regression, and what the tests of the optimizers' contract do with it."""

import io

import torch
from torch import nn


class Net(nn.Module):
    """Regression; the names show roles."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))

    def forward(self, inputs):
        return self.mlp(self.norm(inputs))


def loss_of(model, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(16, n, generator=generator, dtype=dtype) for n in (6, 5))
    return (model(inputs) - targets).square().mean()


def set_gradients(model, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def train(model, optimizer, steps=3, first=0):
    """As most code does; the losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, dtype)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(case, steps=3, **options):
    model = Net()
    optimizer = case(model.named_parameters(), **options)
    train(model, optimizer, steps)
    return model, optimizer


def values(model):
    return [param.detach().clone() for param in model.parameters()]


def equal(one, other):
    one, other = (list(each.parameters()) if isinstance(each, nn.Module) else each for each in (one, other))
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def tensors_in(value):
    """Tensors in nested dicts and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors_in(each)]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, (list, tuple)) else []


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
