"""Gradients with an infinity or a NaN: taken as zero, for the piece that has them, and counted."""

import copy

import pytest
import torch
from models import PlainLM, tiny_gpt, token_batches, train

from lightning_adapm import AdaPM


def twins(**options):
    models = [PlainLM()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [AdaPM(model.named_parameters(), rank=2, update_proj_gap=3, **options) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, token_batches(5))
    return models, optimizers


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_gradient_counts_as_zero(second_moment, bad):
    models, optimizers = twins(second_moment=second_moment)
    for step, tokens in enumerate(token_batches(7, seed=1)):
        for model, optimizer, instead in zip(models, optimizers, (bad, 0.0), strict=True):
            optimizer.zero_grad()
            model(tokens).backward()
            if step in (0, 1, 2):  # one of them is a refresh
                for name, param in model.named_parameters():
                    if "layers.1" in name or "embed" in name:
                        if instead:
                            param.grad.view(-1)[3] = instead
                        else:
                            param.grad.zero_()
            optimizer.step()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert p.isfinite().all()
        assert torch.equal(p, q), name
    broken = {name for name, _ in models[0].named_parameters() if "layers.1" in name or "embed" in name}
    assert optimizers[0].nonfinite_gradients() == dict.fromkeys(broken, 3)
    assert optimizers[1].nonfinite_gradients() == {}


def test_the_subspace_stays():
    (model, _), (optimizer, _) = twins()
    bases = {p: s["exp_avg_r"].clone() for p, s in optimizer.state.items() if "exp_avg_r" in s}
    for _ in range(4):
        for param in model.parameters():
            param.grad = torch.full_like(param, float("nan"))
        optimizer.step()
    assert bases
    assert all(torch.equal(optimizer.state[param]["exp_avg_r"], basis) for param, basis in bases.items())


def test_a_piece_of_a_fused_weight_breaks_alone():
    model = tiny_gpt()
    optimizer = AdaPM(model.named_parameters(), rank=2)
    name, weight = next((n, p) for n, p in model.named_parameters() if n.endswith("0.attn.qkv.weight"))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    weight.grad[-1, 0] = float("inf")
    before = weight.detach().clone()
    optimizer.step()
    value_rows = 2 * 8
    torch.testing.assert_close(weight[-value_rows:], before[-value_rows:] * (1 - 1e-3 * 1e-2))
    assert (weight[:-value_rows] - before[:-value_rows]).abs().min() > 1e-5
    assert optimizer.nonfinite_gradients() == {f"{name} (value)": 1}


def test_large_gradients_are_no_infinities():
    weight = torch.nn.Parameter(torch.zeros(3, 1000))
    optimizer = AdaPM([("mlp.weight", weight)])
    weight.grad = torch.full_like(weight, 3e35)
    optimizer.step()
    assert optimizer.nonfinite_gradients() == {}


def test_the_counts_survive_a_copy():
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = AdaPM([("mlp.weight", weight)])
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    assert copy.deepcopy(optimizer).nonfinite_gradients() == {"mlp.weight": 1}
