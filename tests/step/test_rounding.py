"""Stochastic rounding: without bias, a function of parameter, place and step alone, and enough for small updates."""

import pytest
import torch
from models import PlainLM, gpt_loss, tiny_gpt, token_batches
from torch import nn

import lightning_adapm
from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon
from lightning_adapm.moments import tiles
from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.step import rounding
from lightning_adapm.step.rounding import Stream, rounded

HALF = (torch.bfloat16, torch.float16)
OPTIMIZERS = (AdaPM, AdamMini, AdaLomo, Lomo, LoRAPre, PartialMuon)
PER_STEP = {AdaLomo: 5e-4, LoRAPre: 4.5e-6, PartialMuon: 5e-5}
"""Learning rates, where not 1e-5, with updates of about that size."""


def test_every_optimizer_is_here():
    exported = [getattr(lightning_adapm, name) for name in lightning_adapm.__all__]
    found = {each for each in exported if isinstance(each, type) and issubclass(each, RoleOptimizer)}
    assert found - {RoleOptimizer} == set(OPTIMIZERS)


@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_is_the_value(dtype):
    """Over steps for each element, and over elements: of any size, subnormal ones too. Only neighbors come out."""
    torch.manual_seed(0)
    values = torch.randn(1 << 14) * torch.logspace(-9, 3, 1 << 14)
    stream, steps = Stream(1, 2, 0), 300
    found = torch.stack([rounded(values, stream.bits(0, len(values), step), dtype) for step in range(steps)])
    assert torch.equal(found.to(dtype).float(), found)
    low, high = found.amin(0), found.amax(0)
    assert ((low <= values) & (values <= high)).float().mean() > 0.98  # some are never rounded the unlikely way
    above = torch.nextafter(low.to(dtype), torch.tensor(torch.inf, dtype=dtype)).float()
    assert (high <= above).all()
    errors = (found.double().mean(0) - values) / (above - low)
    assert errors.square().mean().sqrt() < 0.5 / steps**0.5  # no value has a larger deviation than one half
    assert abs(errors.mean()) < 4 * 0.5 / found.numel() ** 0.5


def test_bits_are_independent_of_each_other():
    """Neighbors, rows, steps, parameters and pieces do not have the same bits, and each bit is set half of the time."""
    count = 1 << 18
    base = Stream(*rounding._words("a.weight", "query."), 0)
    bits = base.bits(0, count, 7)
    others = [bits.roll(lag) for lag in (1, 2, 64, 4096)]
    others += [base.bits(0, count, step) for step in (6, 8, 7 + 256, 7 + 65536)]
    for key in (("b.weight", "query."), ("a.weight", "key."), ("a.weight", "")):
        others.append(Stream(*rounding._words(*key), 0).bits(0, count, 7))
    for mask in (0xFFFF, 0x1FFF, 0xFFFFFF00):
        table = torch.stack([bits & mask, *(other & mask for other in others)]).double()
        assert (torch.corrcoef(table)[0, 1:].abs() < 5 / count**0.5).all()
    shares = torch.stack([(bits >> each) & 1 for each in range(32)]).double().mean(1)
    assert ((shares - 0.5).abs() < 5 * 0.5 / count**0.5).all()
    for start in (1000, 1001):
        moved = Stream(base.first, base.second, start - 7)
        assert torch.equal(moved.bits(7, count - start, 7), bits[start:])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", [0, 0xFFFFFFFF])
def test_no_value_becomes_an_infinity(dtype, bits):
    top = torch.finfo(dtype).max
    kept = [float("inf"), -float("inf"), 0.0, -0.0, top, -top, torch.finfo(dtype).tiny, 2.0**-24, -(2.0**-15), 1.5]
    beyond = min(1.001 * top, torch.finfo(torch.float32).max)
    values = torch.tensor([*kept, float("nan"), beyond, -beyond, torch.finfo(torch.float32).max, 1e-45])
    found = rounded(values, torch.full_like(values, bits, dtype=torch.int64), dtype)
    assert torch.equal(found[:10], values[:10]) and torch.equal(found[:10].signbit(), values[:10].signbit())
    assert found[10].isnan() and found[11:14].tolist() == [top, -top, top] and 0 <= found[14] < 1e-7


def trained(make, dtype, steps, weights=None, state=None, **options):
    """Weights of a model whose gradients are drawn, and the optimizer's state."""
    torch.manual_seed(0)
    model = tiny_gpt().to(dtype)
    if weights is not None:
        model.load_state_dict(weights)
    optimizer = make(model.named_parameters(), **{"lr": PER_STEP.get(make, 1e-5)} | options)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return model.state_dict(), optimizer.state_dict()


def equal(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("dtype", HALF)
def test_reproducible_resumable_and_without_random_state(make, dtype):
    before = torch.get_rng_state()
    whole, _ = trained(make, dtype, range(6))
    torch.manual_seed(0), tiny_gpt()
    expected = torch.get_rng_state()
    torch.set_rng_state(before)
    half, state = trained(make, dtype, range(3))
    resumed, _ = trained(make, dtype, range(3, 6), half, state)
    assert equal(resumed, whole)
    assert torch.equal(torch.get_rng_state(), expected)
    assert not equal(trained(make, dtype, range(6), rounding="nearest")[0], whole)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_nothing_else_is_rounded(make):
    for dtype in (torch.float32, torch.float64):
        one, other = (trained(make, dtype, range(3), rounding=each)[0] for each in ("stochastic", "nearest"))
        assert equal(one, other)


def test_to_nearest_as_torch_does():
    found, _ = trained(Lomo, torch.bfloat16, range(3), lr=1e-2, weight_decay=0.1, rounding="nearest")
    torch.manual_seed(0)
    model = tiny_gpt().bfloat16()
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            grad = torch.randn(param.shape, generator=generator).bfloat16()
            param.data.mul_(1 - 1e-2 * 0.1).add_(grad.float(), alpha=-1e-2)
    assert equal(found, model.state_dict())


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_steady_gradient_moves_weights_as_in_float32(make):
    """200 steps of 1e-5, less than a tenth of a unit in the last place of most weights."""
    torch.manual_seed(0)
    weights, grad = torch.randn(64, 48).mul_(0.02).bfloat16(), torch.randn(64, 48).bfloat16()
    moved = {}
    for dtype, each in ((torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.bfloat16, "nearest")):
        param = nn.Parameter(weights.to(dtype, copy=True))
        optimizer = make([("mlp.up_proj.weight", param)], lr=PER_STEP.get(make, 1e-5), weight_decay=0, rounding=each)
        for _ in range(200):
            param.grad = grad.to(dtype)
            optimizer.step()
        moved[dtype, each] = (param.detach().double() - weights.double()).flatten()
    exact, stochastic, nearest = moved.values()
    assert torch.cosine_similarity(stochastic, exact, dim=0) > 0.95
    assert torch.cosine_similarity(nearest, exact, dim=0) < 0.7
    assert abs(stochastic @ exact / (exact @ exact) - 1) < 0.05  # as far


def test_a_matrix_in_tiles_is_rounded_as_a_whole(monkeypatch):
    options = {"second_moment": "elementwise", "momentum": "none"}
    whole, _ = trained(AdaPM, torch.bfloat16, range(3), **options)
    monkeypatch.setattr(tiles, "TILE_NUMEL", 50)
    monkeypatch.setattr(rounding, "_CHUNK_NUMEL", {"cpu": 7})
    in_tiles, _ = trained(AdaPM, torch.bfloat16, range(3), **options)
    assert equal(in_tiles, whole)


def test_in_backward_as_in_an_ordinary_step():
    weights = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        model = tiny_gpt().bfloat16()
        optimizer = AdaPM(model.parameters(), lr=1e-5, momentum="full", update_in_backward=in_backward)
        for tokens in token_batches(3):

            def closure(model=model, tokens=tokens):
                model.zero_grad()
                loss = gpt_loss(model, tokens)
                loss.backward()
                return loss

            optimizer.step(closure)
        weights.append(model.state_dict())
    assert equal(*weights)


def test_weight_decay_and_update_are_rounded_once():
    """Alone, each of them would be an integer number of units."""
    param = nn.Parameter(torch.full((100, 100), 1.0, dtype=torch.bfloat16))
    optimizer = Lomo([("mlp.weight", param)], lr=2.0**-8, weight_decay=1.0)
    param.grad = torch.full_like(param, -1.0)
    optimizer.step()
    assert (param == 1).all()


def test_option_of_a_group():
    model = PlainLM().bfloat16()
    named = list(model.named_parameters())
    groups = [{"params": named[:1]}, {"params": named[1:], "rounding": "nearest"}]
    optimizer = AdaPM(groups, lr=1e-5, weight_decay=0)
    before = [param.detach().clone() for _, param in named]
    for _, param in named:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [group["rounding"] for group in optimizer.param_groups] == ["stochastic", "nearest"]
    moved = [((param != old) & (old.abs() > 0.01)).any() for (_, param), old in zip(named, before, strict=True)]
    assert moved == [True] + [False] * (len(named) - 1)


def test_bad_values_are_refused():
    for make in OPTIMIZERS:
        with pytest.raises(ValueError, match=r"rounding must be one of stochastic, nearest, but got 'up'"):
            make(PlainLM().parameters(), rounding="up")


def test_a_checkpoint_of_before_takes_the_codes_value():
    weights, state = trained(AdaPM, torch.bfloat16, range(3))
    for group in state["param_groups"]:
        del group["rounding"], group["as_built"]["rounding"]
    expected, _ = trained(AdaPM, torch.bfloat16, range(3, 5), weights, trained(AdaPM, torch.bfloat16, range(3))[1])
    assert equal(trained(AdaPM, torch.bfloat16, range(3, 5), weights, state)[0], expected)
