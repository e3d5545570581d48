"""The kernels of a CUDA step, interpreted on a CPU: the same training as without them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from models import relative_difference, tiny_gpt
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lightning_adapm import AdaPM
from lightning_adapm.moments import tiles
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.step import kernels

pytest.importorskip("triton", reason="the kernels are Triton's")


class Mixed(nn.Module):
    """Fused weights, whose queries, keys and values lie behind or beside each other; a stack of experts; odd sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = tiny_gpt(n_embd=30, n_head=2, n_layer=1)
        config = GPTNeoXConfig(
            vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=50
        )
        self.neox = GPTNeoXForCausalLM(config)
        self.experts = nn.Parameter(torch.randn(3, 17, 26) / 4)


def trained(dtype, steps=8, spoiled=(), **options):
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    compact = {"momentum": "compact", "state_dtype": {"low_rank": "bfloat16"}}
    options = {"lr": 1e-2, "roles": {"^experts$": "mlp"}, "update_proj_gap": 3} | compact | options
    optimizer = AdaPM(model.named_parameters(), **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for name, param in model.named_parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            if step in spoiled and name.endswith(("attn.qkv.weight", "query_key_value.weight")):
                param.grad[1, 2] = float("nan")
        optimizer.step()
    states = [v.float().flatten() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return torch.cat([p.detach().float().flatten() for p in model.parameters()]), torch.cat(states), optimizer


def test_bases_are_refreshed_in_groups_of_a_bounded_size(interpreted, monkeypatch):
    options = {"rank": 2, "steps": 5}  # with one refresh after the first bases
    together = trained(torch.float32, **options)[0]
    monkeypatch.setattr("lightning_adapm.step.refreshing.TOGETHER_NUMEL", 1)
    monkeypatch.setattr("lightning_adapm.step.refreshing.TOGETHER_OF_SHARDS", 1)
    torch.testing.assert_close(trained(torch.float32, **options)[0], together)


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_as_without_kernels(interpreted, monkeypatch, second_moment, dtype, tolerance):
    """Also with a gradient that is not finite, and refreshes. The interpreter cuts bfloat16 off, a device rounds it."""
    options = {"second_moment": second_moment, "rank": 2, "state_dtype": None, "spoiled": (5,)}
    weights, state, optimizer = trained(dtype, **options)
    used = {"read", "combine", "weigh", "advance", "move", "sketch"}
    if second_moment == "factored":
        used |= {"factor"} if dtype == torch.float32 else {"factor", "sum_squares"}
    assert set(interpreted) == used
    interpreted.clear()
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, expected_state, reference = trained(dtype, **options)
    assert not interpreted
    assert relative_difference(weights, expected) < tolerance
    assert relative_difference(state, expected_state) < 2e-5
    if dtype == torch.bfloat16:  # the last bit of a float32 decides now and then
        assert (weights == expected).float().mean() > 0.99
    assert optimizer.nonfinite_gradients() == reference.nonfinite_gradients() != {}


def stepped(shapes, steps=5, spoiled=(), scales=(), observer=None, **options):
    """Weights and state of bare matrices after some steps; of one with a NaN where ``spoiled`` has the step."""
    torch.manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    group = {"params": list(params.items()), "n_head": 1, "n_query_groups": 1}
    optimizer = AdaPM([group], **{"momentum": "paper", "rank": 2, "state_dtype": None, "update_proj_gap": 2} | options)
    optimizer.observer = observer
    for step, scale in zip(range(steps), [*scales, *[1.0] * steps], strict=False):
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator) * scale
            if step in spoiled:
                param.grad.view(-1)[-2] = float("nan")
        optimizer.step()
    state = [v.double().flatten() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return torch.cat([p.detach().flatten() for p in params.values()]), torch.cat(state), optimizer


EACH_MOMENTUM = {"q_proj.weight": (12, 18), "v_proj.weight": (12, 18), "o_proj.weight": (12, 18)}


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_a_monitor_keeps_the_path_and_every_bit(interpreted, monkeypatch, second_moment):
    """The same launches, and the figures that a monitor of torch's step has; tiles are smaller than matrices."""
    shapes = EACH_MOMENTUM | {"v_proj.bias": (12,), "mlp.experts": (3, 10, 14)}
    options = {"second_moment": second_moment, "spoiled": (3,), "roles": {"experts": "mlp"}, "clip_threshold": 0.7}
    plain, launches = stepped(shapes, **options), list(interpreted)
    interpreted.clear()
    monkeypatch.setattr(tiles, "TILE_NUMEL", 50)
    probe, reference = ResidualProbe(), ResidualProbe()
    watched = stepped(shapes, observer=probe, **options)
    assert interpreted == launches
    assert torch.equal(watched[0], plain[0]) and torch.equal(watched[1], plain[1])
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    stepped(shapes, observer=reference, **options)
    for found, expected in zip(by_name(probe), by_name(reference), strict=True):
        assert found[:3] == expected[:3]
        assert found.figures == pytest.approx(expected.figures, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_rows_that_processes_share_stay_with_the_kernels(interpreted, monkeypatch, hold_all_rows, second_moment):
    """Also with full momentum, and vectors."""
    shapes = EACH_MOMENTUM | {"v_proj.bias": (12,)}
    options = {"second_moment": second_moment, "spoiled": (3,), "basis": "replicate"}
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected = stepped(shapes, **options)
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    hold_all_rows()
    probe = ResidualProbe()
    found, watched = stepped(shapes, **options), stepped(shapes, observer=probe, **options)
    assert {row.path for row in found[2].step_paths()} == {"kernels"}
    assert interpreted.count("move") == 2 * 5 * len(shapes)
    assert torch.equal(watched[0], found[0]) and torch.equal(watched[1], found[1])
    assert len(probe.read()) == 5 * len(shapes)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert relative_difference(one, other) < 2e-5


def test_processes_sum_once_for_all_matrices(interpreted, hold_all_rows):
    """A step has one collective, and a refresh two more."""
    exchanged, counts = hold_all_rows(), []
    for steps in (3, 4, 5):
        stepped({"q_proj.weight": (12, 18), "k_proj.weight": (6, 18)}, steps, second_moment="block", basis="replicate")
        counts.append(len(exchanged))
        exchanged.clear()
    assert sorted(after - before for before, after in pairwise(counts)) == [1, 3]


def test_means_of_columns_are_over_all_processes(interpreted, hold_all_rows):
    """Of a matrix whose halves are alike, on a process that holds one."""
    half = torch.randn(12, 18, generator=torch.Generator().manual_seed(0))

    def trained(copies):
        weight = nn.Parameter(half.repeat(copies, 1))
        optimizer = AdaPM([("o_proj.weight", weight)], lr=1e-2, momentum="none", second_moment="factored")
        for step in range(3):
            weight.grad = torch.randn(12, 18, generator=torch.Generator().manual_seed(step)).repeat(copies, 1)
            optimizer.step()
        return weight.detach()[:12], optimizer.state[weight]["exp_avg_sq_col"]

    expected = trained(2)
    hold_all_rows(others=True)
    torch.testing.assert_close(trained(1), expected)


def by_name(probe):
    """Readings in an order that no path decides; those of one parameter stay in the order of steps."""
    return sorted(probe.read(), key=lambda reading: reading.name)


@pytest.mark.parametrize("number", [int, np.float32])
@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_numbers_of_any_kind_are_launched_as_floats(interpreted, number, second_moment):
    """As users write them, ``weight_decay=0`` or ``1``; the fixture looks at what is launched."""
    options = {"lr": 1, "eps": 1, "weight_decay": 0, "clip_threshold": 1}
    zero = number(0)
    given = {name: number(value) for name, value in options.items()} | {"betas": (zero, zero)}
    found = stepped(EACH_MOMENTUM, 3, second_moment=second_moment, **given)
    assert "move" in interpreted
    floats = {name: float(value) for name, value in options.items()} | {"betas": (0.0, 0.0)}
    expected = stepped(EACH_MOMENTUM, 3, second_moment=second_moment, **floats)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("state_dtype", "second_moment"),
    [
        ("float16", "block"),
        ("bfloat16", "elementwise"),
        ("float64", "factored"),
        ({"full": "float64", "low_rank": "float16"}, "block"),
    ],
)
def test_state_of_any_dtype(interpreted, monkeypatch, state_dtype, second_moment):
    options = {"state_dtype": state_dtype, "second_moment": second_moment}
    weights, state, optimizer = stepped(EACH_MOMENTUM, **options)
    names = set(state_dtype.values()) if isinstance(state_dtype, dict) else {state_dtype}
    stored = {str(v.dtype) for s in optimizer.state.values() for k, v in s.items() if k in ("exp_avg", "exp_avg_l")}
    assert "move" in interpreted and stored == {f"torch.{name}" for name in names}
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, expected_state, _ = stepped(EACH_MOMENTUM, **options)
    assert relative_difference(weights, expected) < 1e-4
    assert relative_difference(state, expected_state) < 1e-2  # rounding to the state's dtype goes either way


@pytest.mark.parametrize("second_moment", ["elementwise", "factored"])
def test_state_in_eight_bits(interpreted, monkeypatch, second_moment):
    """Low-rank factors, and full momentum in rows of one block, of several and of a rest; watched."""
    shapes = {
        "q_proj.weight": (40, 60),
        "v_proj.weight": (12, 300),
        "0.v_proj.weight": (5, 2100),
        "k_proj.weight": (9, 8),
    }
    options = {"state_dtype": "int8", "second_moment": second_moment, "rank": 8, "spoiled": (3,), "clip_threshold": 0.7}
    probe, plain = ResidualProbe(), ResidualProbe()
    weights, _, optimizer = stepped(shapes, observer=probe, **options)
    assert {row.path for row in optimizer.step_paths()} == {"kernels"} and "move" in interpreted
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, _, reference = stepped(shapes, observer=plain, **options)
    assert relative_difference(weights, expected) < 1e-4
    for found, other in zip(by_name(probe), by_name(plain), strict=True):
        assert found.figures == pytest.approx(other.figures, rel=1e-3, abs=1e-5)
    compared = 0
    for state, other in zip(optimizer.state.values(), reference.state.values(), strict=True):
        for key in (key for key in state if key.endswith(("_codes", "_scale"))):
            compared += 1
            if key.endswith("_scale"):
                torch.testing.assert_close(state[key], other[key], rtol=1e-3, atol=0)
            else:
                apart = (state[key].int() - other[key].int()).abs()
                assert apart.max() <= 1 and apart.count_nonzero() <= 0.01 * apart.numel()
    assert compared == 8


@pytest.mark.parametrize("by_kernels", [True, False])
def test_a_large_gradient_is_no_infinity_in_a_small_dtype(interpreted, monkeypatch, by_kernels):
    monkeypatch.setattr(kernels, "runs_on", lambda device: by_kernels)
    weights, state, optimizer = stepped(EACH_MOMENTUM, 4, scales=(1.0, 1.0, 1.0, 1e8), state_dtype="float16")
    assert bool(interpreted) == by_kernels
    assert weights.isfinite().all() and state.isfinite().all()
    (_, value, _) = optimizer.state.values()
    assert value["exp_avg"].abs().max() > 6e4


def test_one_head_of_many_rows(interpreted, monkeypatch):
    """More than a tile holds, with low-rank momentum and without."""
    shapes = {"q_proj.weight": (270, 20), "k_proj.weight": (1100, 2)}
    options = {"steps": 3, "second_moment": "block", "spoiled": (1,)}
    found = stepped(shapes, **options)
    assert interpreted.count("advance") == 3 + 2 * 2  # the first step of low-rank momentum has no basis yet
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected = stepped(shapes, **options)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert relative_difference(one, other) < 2e-5


def test_a_step_by_kernels_is_seen_by_autograd(interpreted):
    """Going backward again through weights that have changed since is an error, as with torch.optim.AdamW."""
    layer = nn.Linear(6, 4, bias=False)
    optimizer = AdaPM([("mlp.weight", layer.weight)])
    loss = layer(torch.ones(2, 6, requires_grad=True)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    assert "move" in interpreted
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
