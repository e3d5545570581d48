"""Lomo and AdaLomo by kernels, interpreted on a CPU: the same as by torch's operations."""

import pytest
import torch
from allocations import transient_of_a_step
from models import relative_difference
from torch import nn

from lightning_adapm import AdaLomo, Lomo, LoRAPre
from lightning_adapm.moments import tiles
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.step import kernels

pytest.importorskip("triton", reason="the kernels are Triton's")

SHAPES = {
    "attn.query_key_value.weight": (3 * 2 * 6, 20),  # rows of queries, keys and values lie in turn
    "o_proj.weight": (20, 12),
    "mlp.experts": (2, 20, 14),
    "norm.weight": (18,),
}


def trained(kind, dtype=torch.float32, observer=None, **options):
    """Weights, state and optimizer after three steps, one of which has gradients that are not finite."""
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in SHAPES.items()}
    group = {"params": list(weights.items()), "n_head": 2, "n_query_groups": 2, "head_size": 6}
    optimizer = kind([group], lr=0.1, update_in_backward=False, roles={"experts": "mlp"}, **options)
    optimizer.observer = observer
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
            if step == 1:
                weight.grad.view(-1)[-2] = float("nan")
        optimizer.step()
    state = [v.flatten() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return torch.cat([w.detach().float().flatten() for w in weights.values()]), torch.cat(state), optimizer


@pytest.mark.parametrize(
    ("kind", "options", "launched"),
    [
        (Lomo, {"weight_decay": 0.1}, {"read", "move"}),
        (AdaLomo, {"weight_decay": 0.1}, {"read", "factor", "relate", "move"}),
        (AdaLomo, {"clip_threshold": 0.1}, {"read", "factor", "relate", "move"}),
        (LoRAPre, {"weight_decay": 0.1, "rank": 3}, {"read", "combine", "move"}),
    ],
    ids=["Lomo", "AdaLomo", "AdaLomo, clipped", "LoRAPre"],
)
def test_as_without_kernels(interpreted, monkeypatch, kind, options, launched):
    weights, state, optimizer = trained(kind, **options)
    assert set(interpreted) == launched
    assert "kernels" in {row.path for row in optimizer.step_paths()}
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, expected_state, reference = trained(kind, **options)
    # LoRA-Pre divides two predictions, which may be small, where a gradient counts as zero
    assert relative_difference(weights, expected) < (1e-4 if kind is LoRAPre else 1e-6)
    assert relative_difference(state, expected_state) < 1e-6
    assert optimizer.nonfinite_gradients() == reference.nonfinite_gradients() != {}


def test_a_monitor_of_regressions_keeps_every_bit(interpreted, monkeypatch):
    """The same launches, and the figures that a monitor of torch's step has; tiles are smaller than matrices."""
    weights, state, _ = trained(LoRAPre, rank=3)
    launches = list(interpreted)
    interpreted.clear()
    monkeypatch.setattr(tiles, "TILE_NUMEL", 90)
    probe, reference = ResidualProbe(), ResidualProbe()
    watched, watched_state, _ = trained(LoRAPre, observer=probe, rank=3)
    assert interpreted == launches and torch.equal(watched, weights) and torch.equal(watched_state, state)
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    trained(LoRAPre, observer=reference, rank=3)
    readings = zip(*(sorted(each.read(), key=lambda reading: reading[:3]) for each in (probe, reference)), strict=True)
    for found, expected in readings:
        assert found[:3] == expected[:3]
        assert found.figures == pytest.approx(expected.figures, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", [Lomo, AdaLomo, LoRAPre])
def test_parameters_in_bfloat16_are_rounded_alike(interpreted, monkeypatch, kind):
    weights, _, _ = trained(kind, torch.bfloat16)
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, _, _ = trained(kind, torch.bfloat16)
    assert (weights == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adalomo_moves_in_tiles_without_kernels(monkeypatch, dtype):
    """The same as in one piece; a step holds no copy of a matrix in float32."""
    whole, state, _ = trained(AdaLomo, dtype, weight_decay=0.1)
    monkeypatch.setattr(tiles, "TILE_NUMEL", 90)
    in_tiles, same, _ = trained(AdaLomo, dtype, weight_decay=0.1)
    assert relative_difference(in_tiles, whole) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert relative_difference(same, state) < 1e-6
    weight = nn.Parameter(torch.randn(256, 512))
    optimizer = AdaLomo([("mlp.weight", weight)], update_in_backward=False)
    weight.grad = torch.randn(256, 512)
    optimizer.step()
    monkeypatch.setattr(tiles, "TILE_NUMEL", 4096)
    assert transient_of_a_step(optimizer) < 4 * weight.numel() / 2
