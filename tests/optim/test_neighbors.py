"""AdamMini, LOMO, AdaLomo and LoRA-Pre: their formulas written plainly, and other implementations of them."""

import math

import pytest
import torch
from models import PlainLM, token_batches
from torch import nn

from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon
from lightning_adapm.moments.orthogonal import newton_schulz
from lightning_adapm.moments.regression import LowRankRegression


def train(model, optimizer, batches, as_closure=False):
    for tokens in batches:

        def closure(tokens=tokens):
            optimizer.zero_grad()
            loss = model(tokens)
            loss.backward()
            return loss

        if as_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def twins(dtype=torch.float64):
    torch.manual_seed(0)
    model, other = PlainLM(bias=False).to(dtype), PlainLM(bias=False).to(dtype)  # a key's bias has only noise
    other.load_state_dict(model.state_dict())
    return model, other


def assert_same(model, other, tolerance=1e-12):
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def plain_adalomo(params, states, step, lr, weight_decay, clip):
    """arXiv 2310.10195, Algorithm 1, with the constants of its published code."""
    decay = 1 - step**-0.8
    for p, state in zip(params, states, strict=True):
        square = p.grad**2 + 1e-30
        if p.dim() > 1:
            state["row"] = decay * state.get("row", 0.0) + (1 - decay) * square.mean(dim=1)
            state["col"] = decay * state.get("col", 0.0) + (1 - decay) * square.mean(dim=0)
            row, col = state["row"], state["col"]
            u = p.grad / (row / row.mean()).sqrt()[:, None] / col.sqrt()[None, :]
        else:
            state["v"] = decay * state.get("v", 0.0) + (1 - decay) * square
            u = p.grad / state["v"].sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item() / clip)
        rate = lr * max(1e-3, p.detach().square().mean().sqrt().item())
        with torch.no_grad():
            p.mul_(1 - rate * weight_decay).sub_(rate * u)


@pytest.mark.filterwarnings("ignore:update_in_backward")
def test_adalomo_is_its_formulas():
    model, other = twins()
    optimizer = AdaLomo(model.parameters(), lr=0.05, weight_decay=0.1, clip_threshold=0.7)
    states = [{} for _ in other.parameters()]
    for step, tokens in enumerate(token_batches(12), 1):
        train(model, optimizer, [tokens])
        other.zero_grad()
        other(tokens).backward()
        plain_adalomo(list(other.parameters()), states, step, 0.05, 0.1, 0.7)
    assert_same(model, other, 1e-9)


@pytest.mark.filterwarnings("ignore:update_in_backward")
def test_adalomo_is_torchs_adafactor_where_the_two_coincide():
    """Without weight decay, and at a learning rate below the bound that Adafactor puts on it."""
    model, other = twins()
    train(model, AdaLomo(model.parameters(), lr=0.05), token_batches(12))
    adafactor = torch.optim.Adafactor(other.parameters(), lr=0.05, eps=(1e-15, 1e-3), d=1.0, weight_decay=0.0)
    train(other, adafactor, token_batches(12))
    assert_same(model, other, 1e-7)


@pytest.mark.filterwarnings("ignore:update_in_backward")
def test_adalomo_is_pytorch_optimizers():
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    model, other = twins(torch.float32)
    ours = AdaLomo(model.parameters(), lr=0.05, weight_decay=0.1)
    theirs = pytorch_optimizer.AdaLOMO(other, lr=0.05, weight_decay=0.1, loss_scale=0.0)
    for tokens in token_batches(12):
        train(model, ours, [tokens])
        theirs.fused_backward(other(tokens), lr=0.05)
    assert_same(model, other, 2e-4)


@pytest.mark.filterwarnings("ignore:update_in_backward")
def test_adalomo_of_interleaved_heads_is_that_of_separate_weights():
    torch.manual_seed(0)
    heads, size, width = 3, 4, 12
    fused = nn.Parameter(torch.randn(heads * 3 * size, width, dtype=torch.float64))
    attention = nn.Module()
    attention.query_key_value, attention.num_heads = nn.Linear(width, 3 * width), heads
    attention.dense = nn.Linear(width, width)
    attention.query_key_value.weight = fused
    cut = fused.detach().unflatten(0, (heads, 3, size))
    names = ("query", "key", "value")
    alone = [nn.Parameter(cut[:, index].reshape(-1, width).clone()) for index in range(3)]
    roles = {"query_key_value": "qkv_interleaved"}
    whole = AdaLomo(nn.ModuleDict({"attention": attention}).parameters(), lr=0.1, weight_decay=0.1, roles=roles)
    parts = AdaLomo(
        [{"params": [(name, p)], "role": name} for name, p in zip(names, alone, strict=True)], lr=0.1, weight_decay=0.1
    )
    assert [piece.role for piece in whole.pieces[fused]] == list(names)
    for _ in range(4):
        fused.grad = torch.randn_like(fused)
        for index, param in enumerate(alone):
            param.grad = fused.grad.unflatten(0, (heads, 3, size))[:, index].reshape(-1, width).clone()
        whole.step()
        parts.step()
    moved = fused.detach().unflatten(0, (heads, 3, size))
    for index, param in enumerate(alone):
        torch.testing.assert_close(moved[:, index].reshape(-1, width), param.detach(), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:update_in_backward")
def test_lomo_is_gradient_descent():
    model, other = twins()
    train(model, Lomo(model.parameters(), lr=0.3), token_batches(5))
    train(other, torch.optim.SGD(other.parameters(), lr=0.3), token_batches(5))
    assert_same(model, other)


def test_adam_mini_is_adapm_with_full_momentum_and_blocks():
    model, other = twins()
    ours = AdamMini(model.parameters(), lr=1e-2, weight_decay=0.1)
    train(model, ours, token_batches(8))
    block = AdaPM(
        other.parameters(),
        lr=1e-2,
        weight_decay=0.1,
        momentum="full",
        second_moment="block",
        no_decay=("norm", "bias"),
    )
    train(other, block, token_batches(8))
    assert_same(model, other)


@pytest.mark.parametrize(
    "make",
    [
        lambda params, now: AdaPM(params, lr=1e-2, rank=2, weight_decay=0.1, update_in_backward=now),
        lambda params, now: AdaPM(params, lr=1e-2, rank=2, second_moment="factored", update_in_backward=now),
        lambda params, now: AdaLomo(params, lr=1e-2, update_in_backward=now),
        lambda params, now: Lomo(params, lr=1e-1, update_in_backward=now),
        lambda params, now: LoRAPre(params, lr=1e-2, rank=2, update_in_backward=now),
        lambda params, now: PartialMuon(params, lr=1e-2, rank=2, state_dtype=None, update_in_backward=now),
    ],
    ids=["adapm", "factored", "adalomo", "lomo", "lora_pre", "partial_muon"],
)
def test_updates_in_backward_are_those_after_it(make):
    model, other = twins()
    train(model, make(model.parameters(), True), token_batches(25), as_closure=True)
    train(other, make(other.parameters(), False), token_batches(25), as_closure=True)
    assert all(p.grad is None for p in model.parameters())
    assert_same(model, other, 1e-9)


class TestRegressor:
    @pytest.mark.parametrize("variant", ["adam", "muon"])
    @pytest.mark.parametrize("order", ["gauss_seidel", "jacobi"])
    def test_a_constant_gradient_of_low_rank_is_found(self, variant, order):
        torch.manual_seed(0)
        grad = torch.randn(30, 3, dtype=torch.float64) @ torch.randn(3, 20, dtype=torch.float64)
        momentum = LowRankRegression(3, 0.9, order, summed=variant == "muon")
        state = momentum.make(grad.shape, grad)
        goal = grad / (1 - 0.9) if variant == "muon" else grad
        for step in range(1, 121):
            direction = momentum.direction([grad], [state], step)
            used = direction.tensors[0] * (1 if variant == "muon" else direction.scale * (1 - 0.9**step))
            if step >= 60:
                assert ((used - goal).norm() / goal.norm()).item() <= 0.01, step

    def test_a_gradient_of_nearly_its_rank_does_not_blow_up(self):
        torch.manual_seed(0)
        grad = torch.randn(40, 2) @ torch.randn(2, 24)
        momentum = LowRankRegression(4, 0.9, "gauss_seidel")
        state = momentum.make(grad.shape, grad)
        for step in range(1, 201):
            noisy = grad + 1e-6 * torch.randn_like(grad)
            used = momentum.direction([noisy], [state], step).tensors[0]
            assert used.isfinite().all()
            assert used.norm() <= 1.5 * grad.norm(), step
            assert state["exp_avg_l"].norm() * state["exp_avg_r"].norm() <= 100 * grad.norm(), step

    def test_both_moments_are_their_formulas(self):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
        plain = weight.detach().clone()
        optimizer = LoRAPre([("h.0.mlp.fc.weight", weight)], lr=1e-2, betas=(0.9, 0.95), rank=2, weight_decay=0.1)
        b1, b2 = 0.9, 0.95
        left, right, root_left, root_right = None, None, None, None
        for step in range(1, 8):
            grad = torch.randn(12, 8, dtype=torch.float64)
            weight.grad = grad.clone()
            before = {k: v.clone() for k, v in optimizer.state[weight].items()} if step > 1 else None
            optimizer.step()
            if before is None:
                m, v = (1 - b1) * grad, (1 - b2) * grad**2
            else:
                left, right = before["exp_avg_l"], before["exp_avg_r"]
                root_left, root_right = before["exp_avg_sq_l"], before["exp_avg_sq_r"]
                m = b1 * left @ right + (1 - b1) * grad
                v = b2 * (root_left @ root_right) ** 2 + (1 - b2) * grad**2
                g = 1 - math.sqrt(b1)
                new_left = (1 - g) * left + g * grad @ right.T @ torch.linalg.inv(right @ right.T)
                new_right = (1 - g) * right + g * torch.linalg.inv(new_left.T @ new_left) @ new_left.T @ grad
                after = optimizer.state[weight]
                torch.testing.assert_close(after["exp_avg_l"], new_left, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(after["exp_avg_r"], new_right, rtol=1e-4, atol=1e-6)
            m, v = m / (1 - b1**step), v / (1 - b2**step)
            plain = plain * (1 - 1e-2 * 0.1) - 1e-2 * m / (v.sqrt() + 1e-8)
            torch.testing.assert_close(weight.detach(), plain, rtol=1e-9, atol=1e-9)


def test_newton_schulz_makes_orthogonal():
    torch.manual_seed(0)
    for shape in ((6, 20), (20, 6)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(1, *shape))[0].float())
        assert ((values > 0.6) & (values < 1.3)).all()


@pytest.mark.parametrize(
    ("make", "option"),
    [(LoRAPre, {"variant": "sgd"}), (LoRAPre, {"order": "both"}), (AdaLomo, {"clip_threshold": None})],
)
def test_options_out_of_range(make, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        make(PlainLM().parameters(), **option)
