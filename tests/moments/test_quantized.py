"""Momentum in eight bits: how near values come back, what is never stored, and what training makes of it."""

import copy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import PlainLM, relative_difference, tiny_gpt, token_batches, train
from torch import nn

from lightning_adapm import AdamMini, AdaPM, LoRAPre, PartialMuon
from lightning_adapm.moments import tiles
from lightning_adapm.moments.quantized import BLOCK, EightBits
from lightning_adapm.moments.storage import decoded

STORAGE = EightBits()
OPTIONS = {"lr": 3e-3, "rank": 8, "update_proj_gap": 4}


def stored(values):
    state = STORAGE.make("x", values.shape, values.new_empty(()))
    STORAGE.write([state], "x", [values])
    return state


def read(state):
    (values,) = STORAGE.read([state], "x")
    return values


def largest_of_blocks(values):
    parts = [part.abs().amax(-1, keepdim=True).expand_as(part) for part in values.split(BLOCK, dim=-1)]
    return torch.cat(parts, dim=-1)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(3, 256), (5, 300), (2, 4, 8), (1, 1000), (7, 1), (40, 513)]),
    exponent=st.sampled_from([-30, -3, 0, 30]),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_values_come_back_within_half_a_code(shape, exponent, spread, dtype, seed):
    """Values of any sizes side by side; the tiles that they are coded in change nothing."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=dtype)
    values *= 10.0 ** (exponent - spread * torch.rand(shape, generator=generator, dtype=dtype))
    state = stored(values)
    assert all(value.dtype == (torch.int8 if key == "x_codes" else dtype) for key, value in state.items())
    found, largest = read(state), largest_of_blocks(values)
    half = 0.5 / 127
    bound = half * (2 * (values.abs() / largest).sqrt() + half) * largest
    assert ((found - values).abs() <= bound * (1 + 1e-4)).all()
    again = stored(found)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_NUMEL", 300)
        assert all(torch.equal(stored(values)[key], value) for key, value in state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_that_is_not_finite_is_stored(dtype):
    inf, nan, top = float("inf"), float("nan"), torch.finfo(dtype).max
    values = torch.tensor([[inf, 1.0], [-inf, nan], [nan, 2.0], [top, -top], [0.0, 0.0], [0.0, 1e-45]], dtype=dtype)
    state = stored(values)
    assert state["x_scale"].isfinite().all()
    small = 0.0 if dtype == torch.float32 else 1e-45
    expected = [[top, 0.0], [-top, 0.0], [0.0, 2.0], [top, -top], [0.0, 0.0], [0.0, small]]
    torch.testing.assert_close(read(state), torch.tensor(expected, dtype=dtype), rtol=1e-12, atol=0)
    assert not read(stored(torch.zeros(0, 16, dtype=dtype))).numel()


def test_what_is_too_small_stays_in_float32():
    shapes = {"norm.weight": (64,), "mlp.0.weight": (4, 7), "mlp.1.weight": (4, 8), "bias": (), "lora_a": (8, 16)}
    params = {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = AdaPM(params.items(), momentum="full", state_dtype="int8", roles={"^bias$": "bias", "lora": "adapter"})
    for param in params.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    coded = [name for name, param in params.items() if "exp_avg_codes" in optimizer.state[param]]
    assert coded == ["mlp.1.weight"]
    assert all(optimizer.state[params[name]]["exp_avg"].dtype == torch.float32 for name in shapes if name not in coded)


def trained(make, steps=30, **options):
    torch.manual_seed(0)
    model = PlainLM()
    optimizer = make(model.named_parameters(), **options)
    losses = train(model, optimizer, token_batches(steps))
    return model, optimizer, sum(losses[-5:]) / 5


MAKE = {
    "adapm": (partial(AdaPM, **OPTIONS), 0.02),
    "adapm full": (partial(AdaPM, momentum="full", **OPTIONS), 0.02),
    "partial muon": (partial(PartialMuon, **OPTIONS), 0.04),
    "muon": (partial(PartialMuon, momentum="full", **OPTIONS), 0.1),
    "adam-mini": (partial(AdamMini, lr=3e-3), 0.02),
    "lora-pre": (partial(LoRAPre, lr=3e-3, rank=8), 0.2),
}
"""Optimizers with the tolerance of what weights have moved by after 30 steps, relative to float32 in norm."""


@pytest.mark.parametrize(("make", "tolerance"), MAKE.values(), ids=MAKE)
def test_training_stays_near_that_in_float32(make, tolerance):
    """The loss is the same within 0.2 %."""
    model, _, loss = trained(make)
    coded, optimizer, coded_loss = trained(make, state_dtype="int8")
    torch.manual_seed(0)
    before = torch.cat([param.flatten() for param in PlainLM().parameters()])
    moved, expected = (torch.cat([p.flatten() for p in m.parameters()]) - before for m in (coded, model))
    assert any(key.endswith("_codes") for state in optimizer.state.values() for key in state)
    assert relative_difference(moved, expected) < tolerance
    assert coded_loss == pytest.approx(loss, rel=2e-3)


def moments_of(optimizer):
    """Values of all momentum, by parameter and key."""
    for param in optimizer.param_groups[0]["params"]:
        for key, value in sorted(decoded(optimizer.state[param]).items()):
            if key.rpartition(".")[2] in ("exp_avg", "exp_avg_l", "exp_avg_r"):
                yield value


@pytest.mark.parametrize("momentum", [None, "full"])
@pytest.mark.parametrize("other", [None, "bfloat16", {"full": "float64", "low_rank": "int8"}])
def test_a_checkpoint_of_another_dtype_is_converted(momentum, other, tmp_path):
    """There and back, with one line that the settings differ; what has eight bits on both sides is not touched."""
    torch.manual_seed(0)
    model, options = tiny_gpt(), {**OPTIONS, "momentum": momentum}
    plain = AdaPM(model.parameters(), state_dtype=other, **options)
    train(model, plain, token_batches(6))
    coded, back = AdaPM(model.parameters(), state_dtype="int8", **options), copy.deepcopy(plain)
    for source, target in ((plain, coded), (coded, back)):
        torch.save(source.state_dict(), tmp_path / "state.pt")
        with pytest.warns(UserWarning, match="AdaPM goes on with state_dtype="):
            target.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        compared = list(zip(moments_of(plain), moments_of(target), strict=True))
        assert compared
        for before, after in compared:
            error = (after.double() - before.double()).abs()
            assert (error <= before.double().abs().amax(-1, keepdim=True) / 80).all()
    held = zip(plain.state.values(), back.state.values(), strict=True)
    assert all(before.keys() == after.keys() for before, after in held)
    train(model, coded, token_batches(2, seed=1))


def test_states_of_adamw_and_of_other_ranks_are_converted():
    torch.manual_seed(0)
    model = PlainLM()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, token_batches(6))
    coded = AdaPM(model.named_parameters(), momentum="full", state_dtype="int8", lr=1e-3)
    coded.load_state_dict(adamw.state_dict())
    for state, value in zip(adamw.state.values(), moments_of(coded), strict=True):
        assert relative_difference(value, state["exp_avg"]) < 0.02
    _, ranked, _ = trained(MAKE["adapm"][0], steps=5, state_dtype="int8")
    for rank in (9, 2):  # of rank 2 the left factor stays in float32
        other = AdaPM(PlainLM().named_parameters(), state_dtype="int8", **{**OPTIONS, "rank": rank})
        with pytest.warns(UserWarning, match="rank"):
            other.load_state_dict(ranked.state_dict())
