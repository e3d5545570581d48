"""A monitor sees a step and changes none of it: no bit of weights and state, and no more memory than a few tiles."""

import pytest
import torch
from models import gpt_loss, tiny_gpt, token_batches
from optimizers import CASES
from torch import nn

from benchmarks.costs.memory import AllocationTracker
from lightning_adapm import AdaPM
from lightning_adapm.moments import tiles
from lightning_adapm.report.diagnostics import ResidualProbe

OWN = {name: case for name, case in CASES.items() if name != "AdaLomo"}  # which moves by its own formula


def trained(case, watched, in_backward=False, dtype=torch.float32):
    """Weights, state and readings of a model with fused weights."""
    torch.manual_seed(0)
    model = tiny_gpt().to(dtype)
    optimizer = case(model.named_parameters(), **({"update_in_backward": True} if in_backward else {}))
    probe = ResidualProbe()
    for number, tokens in enumerate(token_batches(5)):
        optimizer.observer = probe if watched and number % 2 == 0 else None

        def closure(tokens=tokens):
            optimizer.zero_grad()
            loss = gpt_loss(model, tokens)
            loss.backward()
            return loss

        optimizer.step(closure)
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)]
    return [*(param.detach() for param in model.parameters()), *state], probe.read()


def assert_same(found, expected):
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", OWN)
def test_a_monitor_changes_no_bit(monkeypatch, name):
    """Also where matrices are moved and watched in several tiles, which gives the same figures as at once."""
    plain, _ = trained(OWN[name], watched=False)
    found, at_once = trained(OWN[name], watched=True)
    assert_same(found, plain)
    assert {reading.role for reading in at_once} >= {"query", "value", "mlp", "norm"}
    monkeypatch.setattr(tiles, "TILE_NUMEL", 100)
    if "Muon" not in name and "muon" not in name:  # whose iteration enlarges the rounding of other batches
        monkeypatch.setattr("lightning_adapm.step.batching._BATCH_NUMEL", {"cpu": 1, "cuda": 1})
    _, in_tiles = trained(OWN[name], watched=True)
    for one, other in zip(in_tiles, at_once, strict=True):
        assert one[:3] == other[:3]
        assert one.figures == pytest.approx(other.figures, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("name", ["AdaPM block", "PartialMuon"])
@pytest.mark.parametrize(("in_backward", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_nor_inside_backward_and_in_low_precision(name, in_backward, dtype):
    plain, _ = trained(OWN[name], False, in_backward, dtype)
    found, readings = trained(OWN[name], True, in_backward, dtype)
    assert_same(found, plain)
    assert any("stationarity" in reading.figures for reading in readings)


TILE = 4096


def peak(watched, first=False, **options):
    """Bytes that the ``first`` or the second step of a large matrix allocates at most, and frees again."""
    weight = nn.Parameter(torch.randn(2048, 128, generator=torch.Generator().manual_seed(0)))
    optimizer = AdaPM(
        [("lm_head.weight", weight)], **{"rank": 4, "momentum": "compact", "update_proj_gap": 10} | options
    )
    probe, tracker = ResidualProbe(), AllocationTracker()
    optimizer._make_state(weight)
    for number in range(1 if first else 2):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        optimizer.observer = probe if watched else None
        held = [weight, weight.grad, *(v for v in optimizer.state[weight].values() if isinstance(v, torch.Tensor))]
        tracker.begin({"held": held})
        with tracker.following():
            optimizer.step()
    return tracker.peak["transient"]


@pytest.mark.parametrize("second_moment", ["block", "elementwise", "factored"])
def test_first_steps_and_refreshes_hold_no_matrix(monkeypatch, second_moment):
    """Factors, sums and tiles take less than a byte per element; float32 takes four."""
    monkeypatch.setattr(tiles, "TILE_NUMEL", TILE)
    for first in (True, False):
        assert peak(False, first=first, update_proj_gap=1, second_moment=second_moment) < 2048 * 128


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_a_monitor_holds_a_few_tiles(monkeypatch, second_moment):
    monkeypatch.setattr(tiles, "TILE_NUMEL", TILE)
    plain, found = (peak(watched, second_moment=second_moment) for watched in (False, True))
    assert found - plain <= 6 * 4 * TILE < 2048 * 128  # bytes of tiles in float32, a quarter of the matrix
