"""The last part of a step: large matrices are updated in parts, with the same result."""

import pytest
import torch
from models import PlainLM, tiny_gpt
from torch import nn

from benchmarks.costs.memory import AllocationTracker
from lightning_adapm import AdaPM
from lightning_adapm.moments import tiles
from lightning_adapm.moments.batches import join
from lightning_adapm.step import by_torch as update
from lightning_adapm.step import gradients
from lightning_adapm.step.gradients import Gradients


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 24) / 4)
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return (torch.tanh(x[:, : 2 * 16].reshape(-1, 16) @ self.experts) + self.bias).square().mean()


class GPTLoss(nn.Module):
    """litgpt's model, whose qkv is fused."""

    def __init__(self):
        super().__init__()
        self.net = tiny_gpt()

    def forward(self, tokens):
        return nn.functional.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def trained(make, second_moment, steps=23):
    torch.manual_seed(0)
    model = make().double()
    optimizer = AdaPM(
        model.named_parameters(),
        lr=1e-2,
        rank=2,
        momentum="compact",
        second_moment=second_moment,
        roles={"^experts$": "mlp"},
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randint(61, (4, 33), generator=generator)
        optimizer.zero_grad()
        model(x.double() / 30 if make is Experts else x).sum().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("make", [PlainLM, GPTLoss, Experts])
def test_in_parts_is_as_at_once(monkeypatch, make, second_moment):
    at_once = trained(make, second_moment)
    parts = []
    in_tiles = update.tiles

    def counted(*args, **kwargs):
        found = list(in_tiles(*args, **kwargs))
        parts.append(len(found))
        return found

    monkeypatch.setattr(tiles, "TILE_NUMEL", 100)
    monkeypatch.setattr(update, "tiles", counted)
    monkeypatch.setattr("lightning_adapm.step.batching._BATCH_NUMEL", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr("lightning_adapm.step.batching._UNCOPIED_NUMEL", {"cpu": 1, "cuda": 1})
    in_parts = trained(make, second_moment)
    assert max(parts) >= 3
    torch.testing.assert_close(in_parts, at_once, rtol=0, atol=1e-9)


def moved(monkeypatch, together, second_moment):
    """Six large matrices after 12 steps, the most that a step allocates, and the operations of the last one."""
    monkeypatch.setattr("lightning_adapm.step.batching._UNCOPIED_NUMEL", {"cpu": together, "cuda": 1})
    monkeypatch.setattr("lightning_adapm.step.batching._REFRESHED_NUMEL", {"cpu": together, "cuda": 1})
    monkeypatch.setattr(tiles, "TILE_NUMEL", 1 << 15)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(264, 256, generator=generator, dtype=torch.float64) for _ in range(6)]
    named = [(f"blocks.{2 * index}.mlp.up_proj.weight", nn.Parameter(weight)) for index, weight in enumerate(weights)]
    optimizer, tracker = AdaPM(named, lr=1e-2, rank=4, second_moment=second_moment), AllocationTracker()
    for step in range(12):
        for _, param in named:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        state = [
            value for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)
        ]
        if step:
            tracker.begin({"held": [*weights, *(param.grad for _, param in named), *state]})
        with tracker.following():
            optimizer.step()
        operations, tracker.operations = tracker.operations, 0
    return torch.stack(weights), tracker.peak["transient"], operations


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_large_matrices_step_together_without_copies(monkeypatch, second_moment):
    """Fewer operations than one by one, the same weights, and temporaries of less than two of six."""
    alone, _, operations = moved(monkeypatch, 1, second_moment)
    together, peak, fewer = moved(monkeypatch, 1 << 24, second_moment)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert peak < 2 * alone[0].nbytes
    assert fewer < 0.85 * operations, (fewer, operations)


@pytest.mark.parametrize("shape", [(5, 7), (2, 5, 7)])
def test_gradients_are_multiplied_as_one_batch(shape, monkeypatch):
    monkeypatch.setattr(gradients, "_SQUARED_ROWS", 2)
    grads = Gradients([torch.randn(shape, dtype=torch.float64) for _ in range(3)])
    whole = join(list(grads))
    right, left = torch.randn(len(whole), 7, 2).double(), torch.randn(len(whole), 2, 5).double()
    assert grads.shape == whole.shape
    torch.testing.assert_close(grads @ right, whole @ right)
    torch.testing.assert_close(left @ grads, left @ whole)
    for dim in (-1, -2):
        expected = torch.stack([grad.square().sum(dim, keepdim=True) for grad in grads])
        torch.testing.assert_close(grads.squares(dim), expected)
    torch.testing.assert_close(grads.squares(None), torch.stack([grad.square().sum() for grad in grads]))
    grads.squares(-1).zero_()  # reductions change what they are given
    assert grads.squares(-1).all()
