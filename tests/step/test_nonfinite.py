"""Gradients with an infinity or a NaN: taken as zero, for the piece that has them, and counted."""

import copy
import warnings

import pytest
import torch
from models import PlainLM, tiny_gpt, token_batches, train
from torch import nn

from lightning_adapm import AdaPM
from lightning_adapm.moments.batches import join
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.step import nonfinite
from lightning_adapm.step.nonfinite import NonFiniteGradients
from lightning_adapm.step.parts import Part


def twins(**options):
    models = [PlainLM()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        AdaPM(model.named_parameters(), rank=2, update_proj_gap=3, **{"momentum": "compact"} | options)
        for model in models
    ]
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
    optimizer = AdaPM(model.named_parameters(), rank=2, momentum="compact")
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


def test_a_gate_breaks_without_its_up_projection():
    weight = nn.Parameter(torch.ones(6, 4))
    optimizer = AdaPM([("mlp.gate_up_proj.weight", weight)])
    weight.grad = torch.ones_like(weight)
    weight.grad[1, 2] = float("nan")
    optimizer.step()
    assert optimizer.nonfinite_gradients() == {"mlp.gate_up_proj.weight (gate)": 1}
    assert (weight[:3] - (1 - 1e-3 * 1e-2)).abs().max() < 1e-6 < (weight[3:] - 1).abs().min() / 100


class OnTwoProcesses:
    """The layout of a weight of which this process holds the first half."""

    def __new__(cls, weight, group):
        half = weight.numel() // 2
        return Layout(weight.shape, ((0, half), (half, 2 * half)), 0, group)


def moving_of(params, group):
    """As a process sees pieces of one name each, with the rows it has of gradients; gate and up of the last."""
    pieces = [Piece("mlp")] * (len(params) - 1) + [Piece("mlp", 0, 2, part="gate"), Piece("mlp", 2, 4, part="up")]
    owners = [*enumerate(params), (len(params) - 1, params[-1])]
    return [
        (Part((number, piece.start), "mlp.weight", owner, piece, OnTwoProcesses(owner, group)), owner.grad[:2])
        for (number, owner), piece in zip(owners, pieces, strict=True)
    ]


def test_processes_agree_by_parameter_and_piece(monkeypatch):
    """Whatever the order in which each process puts pieces together, and whatever they are called."""
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones_like(param)
    params[0].grad[0, 0] = params[2].grad[1, 1] = float("nan")
    moving = moving_of(params, group="both")
    sent = []
    monkeypatch.setattr(nonfinite, "all_reduce", lambda flags, group, op: sent.append((flags.tolist(), group)))
    for order in (moving, moving[::-1], [moving[i] for i in (2, 0, 3, 1)]):
        found = NonFiniteGradients()
        found.agree(order)
        assert found.agreed_on([part for part, _ in moving]).tolist() == [False, True, False, True]
    assert sent == [([0, 1, 0, 1], "both")] * 3


def test_counts_are_kept_by_piece_however_pieces_are_batched():
    """Their number is that of the pieces that ever broke: it does not grow with steps."""
    params = [nn.Parameter(torch.ones(4, 3)) for _ in range(4)]
    optimizer = AdaPM([(f"mlp.{index}.weight", param) for index, param in enumerate(params)])
    for step in range(30):
        for index, param in enumerate(params):
            broken = float("nan") if index == step % 3 else 1.0
            param.grad = None if step % (index + 2) == 0 else torch.full_like(param, broken)
        optimizer.step()
    counts = [sum(step % 3 == i and step % (i + 2) != 0 for step in range(30)) for i in range(3)]
    assert optimizer.nonfinite_gradients() == {f"mlp.{i}.weight": count for i, count in enumerate(counts) if count}
    assert len(optimizer._engine.nonfinite._counts) <= 4


def broken_steps(optimizer, params, pattern):
    """Steps with gradients that are all broken where ``pattern`` has a 1; the number of warnings after each."""
    warned = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for broken in pattern:
            for index, param in enumerate(params):
                fine = not broken or (broken == "partly" and index == 0)
                param.grad = torch.full_like(param, 1.0 if fine else float("inf"))
            optimizer.step()
            warned.append(sum("every gradient held an infinity" in str(each.message) for each in caught))
    return warned


def test_gradients_that_are_all_broken_for_steps_are_warned_of_once():
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
    optimizer = AdaPM(zip(("mlp.weight", "mlp.bias"), params, strict=True))
    pattern = [1, 1, 0, 1, 1, "partly", 1, 1, 1, 1, 1, 0, 1, 1, 1]
    assert broken_steps(optimizer, params, pattern) == [0] * 8 + [1] * 7
    assert broken_steps(copy.deepcopy(optimizer), params, [1] * 4) == [0] * 4
    assert optimizer._engine.nonfinite._flaws == []


def test_gradients_used_in_backward_are_watched_by_step():
    model = nn.ModuleDict({"mlp": nn.Linear(3, 3)})
    optimizer = AdaPM(model.named_parameters(), update_in_backward=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(4):
            optimizer.step(lambda: (model["mlp"](torch.ones(1, 3)).sum() * float("nan")).backward())
            assert bool(caught) == (step >= 2)
    (warning,) = caught
    assert "every gradient held an infinity or a NaN in 3 steps in a row" in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
def test_gradients_are_put_together_once(shape):
    """Those of a device are one tensor, which moments multiply without another copy."""
    parts = [Part((index, 0), f"layers.{index}.mlp", torch.empty(shape), Piece("mlp"), None) for index in range(3)]
    whole = torch.randn(3, *shape)
    expected = whole.clone()
    whole[1].view(-1)[7], expected[1] = float("nan"), 0.0
    found = NonFiniteGradients()._zeroed(parts, whole)
    joined = join(found)
    assert joined.data_ptr() == whole.data_ptr() and torch.equal(joined, join(list(expected)))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_any_shapes_are_found_to_be_finite_together(dtype):
    """A sum of large finite numbers overflows; what a process holds of a gradient may be nothing."""
    values = [[1.0, 2.0], [], [1.0, float("nan"), 2.0], [3e38, 3e38, 3e38], [-float("inf"), 1.0]]
    grads = [torch.tensor(each, dtype=dtype) for each in values]
    assert nonfinite._each_finite(grads).tolist() == [True, True, False, True, False]
    assert nonfinite._each_finite(grads[1:2]).tolist() == [True]
