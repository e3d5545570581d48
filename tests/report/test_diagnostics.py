"""What the monitors report, compared with a direct computation."""

import pytest
import torch
from models import PlainLM, tiny_gpt, token_batches, train

from lightning_adapm import AdaPM, PartialMuon
from lightning_adapm.moments.orthogonal import newton_schulz
from lightning_adapm.report.diagnostics import OTHER, ResidualProbe, StateReport, sketch
from lightning_adapm.report.plan import StateBytes, measure


@pytest.mark.parametrize("make", [PlainLM, tiny_gpt], ids=["plain", "litgpt"])
def test_state_report_of_adapm(make):
    model = make()
    optimizer = AdaPM(model.parameters(), momentum={"embedding": "none"}, second_moment="block")
    train(model, optimizer, token_batches(1))
    report = StateReport.measure([optimizer], model)
    assert report.total == measure(optimizer)
    assert report.by_role["embedding"].momentum == 0 < report.by_role["value"].momentum
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, token_batches(1))
    assert report.adamw_total == measure(adamw)
    other = StateReport.measure([adamw], model)
    assert other.by_role == report.adamw
    assert other.total == measure(adamw)


def test_state_report_of_any_optimizer():
    model = PlainLM()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, sgd, token_batches(1))
    report = StateReport.measure([sgd], model)
    assert report.total.momentum == 4 * sum(p.numel() for p in model.parameters())
    assert report.figures()["second_moment_bytes"] == 0


def test_state_report_of_what_is_nested_lost_or_of_no_role():
    """As of optimizers that keep lists of preconditioners, and of parameters that were taken out of a group."""
    model = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"qkv": torch.nn.Linear(16, 40)}), "mlp": PlainLM()})
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    fused, bias, table = list(model.parameters())[:3]
    bias.requires_grad_(False)
    sgd.state[fused] = {"exp_avg": torch.zeros(7)}  # which rows are whose is not known
    sgd.state[table] = {"blocks": [torch.zeros(3), torch.zeros(2)], "inner": {"exp_avg": torch.zeros(5)}}
    sgd.state[torch.nn.Parameter(torch.zeros(4))] = {"exp_avg_sq": torch.zeros(4)}
    report = StateReport.measure([sgd], model)
    assert report.by_role["embedding"] == StateBytes(momentum=20, other=20)
    assert report.by_role[OTHER] == StateBytes(momentum=28, second_moment=16)
    assert report.total == measure(sgd)
    assert report.adamw_total.momentum == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_probe_is_a_direct_computation():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 10))
    options = {"rank": 2, "update_proj_gap": 50, "clip_threshold": 0.5, "state_dtype": None}
    optimizer = AdaPM([("layers.0.mlp.weight", weight)], **options)
    probe = optimizer.observer = ResidualProbe()
    for step in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(12, 10)
        optimizer.step()
        (reading,) = probe.read()
        state = optimizer.state[weight]
        basis = state["exp_avg_r"]
        unseen = weight.grad - weight.grad @ basis.T @ basis
        used = unseen + state["exp_avg_l"] @ basis / (1 - 0.9 ** (step + 1))
        update = used / ((state["exp_avg_sq"] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        assert reading.figures["norm"] == pytest.approx((unseen.norm() / used.norm()).item(), rel=1e-4)
        assert reading.figures["update_max"] == pytest.approx(update.abs().max().item(), rel=1e-4)
        assert reading.figures["clamped"] == pytest.approx((update.abs() > 0.5).float().mean().item(), abs=1e-6)
        torch.testing.assert_close(weight.detach(), before * (1 - 1e-5) - 1e-3 * update.clamp(-0.5, 0.5))
    assert ("stationarity" in reading.figures) and abs(reading.figures["stationarity"]) < 0.6


def test_probe_sees_the_direction_that_is_made_orthogonal():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(12, 10, dtype=torch.float64))
    options = {"rank": 2, "update_proj_gap": 50, "state_dtype": None, "newton_schulz": "muon"}
    optimizer = PartialMuon([("layers.0.mlp.weight", weight)], **options)
    probe = optimizer.observer = ResidualProbe()
    for step in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        (reading,) = probe.read()
        left, basis = (optimizer.state[weight][key] for key in ("exp_avg_l", "exp_avg_r"))
        seen = weight.grad @ basis.T
        inside = 0.05 * seen + 0.95 * left / (1 - 0.95 ** (step + 1))
        unseen = weight.grad - seen @ basis
        used = inside @ basis + unseen
        assert reading.figures["norm"] == pytest.approx((unseen.norm() / used.norm()).item(), rel=1e-6)
        update = 0.2 * 12**0.5 * newton_schulz(used[None])
        assert reading.figures["update_max"] == pytest.approx(update.abs().max().item(), rel=1e-6)
        assert "clamped" not in reading.figures


@pytest.mark.parametrize("shape", [(40, 120), (120, 40), (3, 50, 60)])
def test_probe_estimates_how_far_an_update_is_from_orthogonal(monkeypatch, shape):
    """From tiles that end anywhere; in a stack, squares are averaged over matrices."""
    monkeypatch.setattr("lightning_adapm.moments.tiles.TILE_NUMEL", 500)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = PartialMuon([("layers.0.mlp.weight", weight)], lr=1.0, rank=2, weight_decay=0)
    probe, before = ResidualProbe(), weight.detach().clone()
    optimizer.observer, weight.grad = probe, torch.randn_like(weight)
    optimizer.step()
    update = (before - weight.detach()) / (0.2 * max(shape[-2:]) ** 0.5)
    values = torch.linalg.svdvals(update)
    (reading,) = probe.read()
    expected = (values.square() - 1).square().mean().sqrt().item()
    assert reading.figures["orthogonality"] == pytest.approx(expected, rel=0.15)


def test_stationarity_of_a_constant_residual_is_one():
    weight = torch.nn.Parameter(torch.randn(12, 10))
    optimizer = AdaPM([("mlp.weight", weight)], rank=2, update_proj_gap=50)
    probe = optimizer.observer = ResidualProbe()
    weight.grad = torch.randn(12, 10)
    for _ in range(3):
        optimizer.step()
        (reading,) = probe.read()
    assert reading.figures["stationarity"] == pytest.approx(1.0, abs=1e-5)


def test_sketch_leaves_the_random_state_and_approximates_cosines():
    state = torch.get_rng_state()
    a, b = torch.randn(1, 200, 150, generator=torch.Generator().manual_seed(1)), torch.ones(1, 200, 150)
    mixed = a + 0.5 * b
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), mixed.flatten(), dim=0)
    sketched = torch.nn.functional.cosine_similarity(sketch(a).flatten(), sketch(mixed).flatten(), dim=0)
    assert sketched == pytest.approx(cosine.item(), abs=0.15)
    parts = [sketch(a[:, :70].double(), 0, 200), sketch(a[:, 70:].double(), 70, 200)]
    torch.testing.assert_close(sum(parts), sketch(a.double()))
    assert sketch(a).numel() == 256
    assert torch.equal(torch.get_rng_state(), state)


def test_without_an_observer_nothing_is_observed():
    model = PlainLM()
    optimizer = AdaPM(model.parameters())
    probe = ResidualProbe()
    train(model, optimizer, token_batches(1))
    assert probe.read() == []
