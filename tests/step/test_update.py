"""The last part of a step: large matrices are updated in parts, with the same result."""

import pytest
import torch
from models import PlainLM, tiny_gpt
from torch import nn

from lightning_adapm import AdaPM
from lightning_adapm.moments import tiles
from lightning_adapm.step import by_torch as update


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
        model.named_parameters(), lr=1e-2, rank=2, second_moment=second_moment, roles={"^experts$": "mlp"}
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
    in_parts = trained(make, second_moment)
    assert max(parts) >= 3
    torch.testing.assert_close(in_parts, at_once, rtol=0, atol=1e-9)
