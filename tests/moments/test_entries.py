"""A moment declares what it keeps once: planning, saving, loading and conversion follow, also for those of the docs."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from extending import Float8, SignAdam, SignMomentum
from models import PlainLM, token_batches, train

from lightning_adapm import AdaPM, explain
from lightning_adapm.moments.first import FullMomentum
from lightning_adapm.optim.base import RoleOptimizer
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.report.plan import measure


class SignAdaPM(AdaPM):
    def momentum_for(self, piece, shape, group):
        return SignMomentum(group["betas"][0]) if len(shape) == 2 else super().momentum_for(piece, shape, group)


class Float8AdaPM(AdaPM):
    def momentum_for(self, piece, shape, group):
        momentum = super().momentum_for(piece, shape, group)
        return replace(momentum, storage=Float8()) if momentum.name != "none" and len(shape) == 2 else momentum


MAKE: Mapping[str, Callable[..., RoleOptimizer]] = {
    "moment": SignAdaPM,
    "storage": Float8AdaPM,
    "optimizer": SignAdam,
    "optimizer, storage": partial(SignAdam, float8=True),
}
OPTIONS = {"lr": 1e-3, "rank": 2, "update_proj_gap": 3}


def options_of(make):
    return OPTIONS if isinstance(make, type) and issubclass(make, AdaPM) else {"lr": 1e-3}


def trained(make, observer=None, **options):
    torch.manual_seed(0)
    model = PlainLM()
    optimizer = make(model.named_parameters(), **(options_of(make) | options))
    optimizer.observer = observer
    train(model, optimizer, token_batches(5))
    return model, optimizer


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_what_is_planned_is_what_is_held(make):
    model, optimizer = trained(make)
    assert measure(optimizer) == explain(make(model.named_parameters(), **options_of(make))).total


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_resumed_run_is_the_same(make, tmp_path):
    model, optimizer = trained(make)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(model)
    resumed = make(twin.named_parameters(), **options_of(make))
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = token_batches(9)[5:]
    train(model, optimizer, rest)
    train(twin, resumed, rest)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_monitor_sees_what_changes_nothing(make):
    (model, _), probe = trained(make), ResidualProbe()
    watched, optimizer = trained(make, probe)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), watched.parameters(), strict=True))
    parts = [part for param in watched.parameters() for part in optimizer.parts(param)]
    readings = probe.read()
    assert len(readings) == 5 * len(parts) and any(reading.figures["update_max"] > 0 for reading in readings)


def test_a_moment_that_cannot_be_converted_says_so():
    model, optimizer = trained(AdaPM)
    with pytest.raises(ValueError, match="SignMomentum cannot be made from the state of another moment"):
        SignAdaPM(model.named_parameters()).load_state_dict(optimizer.state_dict())
    model, optimizer = trained(SignAdaPM)
    with pytest.raises(ValueError, match="the state of a SignMomentum cannot become that of another moment"):
        AdaPM(model.named_parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("keys", [SignMomentum.keys, frozenset()], ids=["with keys", "without keys"])
def test_a_moment_of_ones_own_moves_between_storages(monkeypatch, keys):
    """From the values alone, as sharded state dicts hold them, and from what another storage keeps."""
    monkeypatch.setattr(SignMomentum, "keys", keys)
    model, plain = trained(SignAdam)
    float8 = SignAdam(model.named_parameters(), float8=True)
    float8.load_state_dict(plain.state_dict())
    back = SignAdam(model.named_parameters())
    back.load_state_dict(float8.state_dict())
    averages = [(state["sign_avg"], back.state[param]) for param, state in plain.state.items() if "sign_avg" in state]
    assert averages
    for average, state in averages:
        assert ((state["sign_avg"] - average).abs() <= average.abs().amax(-1, keepdim=True) / 16).all()
        assert state["seen"] == 5 and state["sign_avg"].any()
    broken = plain.state_dict()
    shortened = next(state for state in broken["state"].values() if "sign_avg" in state)
    shortened["sign_avg"] = shortened["sign_avg"][1:]
    with pytest.raises(ValueError, match="does not fit its shape .*sign_avg"):
        float8.load_state_dict(broken)


@pytest.mark.parametrize("momentum", [None, "full"])
def test_values_move_between_storages(momentum):
    model, plain = trained(AdaPM, momentum=momentum)
    float8 = Float8AdaPM(model.named_parameters(), momentum=momentum, **OPTIONS)
    float8.load_state_dict(plain.state_dict())
    back = AdaPM(model.named_parameters(), momentum=momentum, **OPTIONS)
    back.load_state_dict(float8.state_dict())
    compared = 0
    for param, state in plain.state.items():
        assert state.keys() == back.state[param].keys()
        for key, value in state.items():
            if key.startswith("exp_avg") and not key.startswith("exp_avg_sq") and value.dim() == 2:
                error = (back.state[param][key] - value).abs()
                assert (error <= value.abs().amax(-1, keepdim=True) / 16).all(), key
                compared += 1
    assert compared


def test_options_that_change_in_every_step_build_no_part_anew():
    model, optimizer = trained(AdaPM)
    before = [part for param in model.parameters() for part in optimizer.parts(param)]
    buckets = len({part.alike for part in before})
    for step, tokens in enumerate(token_batches(4, seed=1)):
        for group in optimizer.param_groups:
            group["betas"], group["weight_decay"] = (0.9 - 0.01 * step, 0.999), 0.01 * step
        train(model, optimizer, [tokens])
        parts = [part for param in model.parameters() for part in optimizer.parts(param)]
        assert all(one is other for one, other in zip(parts, before, strict=True))
        full = next(part.first for part in parts if isinstance(part.first, FullMomentum))
        assert full.beta1 == 0.9 - 0.01 * step
    assert buckets == len({part.alike for part in before}) == len(optimizer._table.alike) < len(before)


def test_step_paths_cover_every_part():
    model, optimizer = trained(AdaPM)
    rows = optimizer.step_paths()
    assert sum(row.number for row in rows) == sum(len(optimizer.parts(param)) for param in model.parameters())
    assert {(row.path, row.reason) for row in rows} == {("torch", "no kernels on cpu")}
    assert {role for row in rows for role in row.roles} >= {"embedding", "query", "value", "mlp", "norm", "bias"}
