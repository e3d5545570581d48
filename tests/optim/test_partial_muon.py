"""PartialMuon is what it says: Muon and AdamW where they apply, formulas of a few lines elsewhere."""

import copy

import pytest
import torch
from hidden_matrices import WEIGHT, hidden, one_weight, steps
from models import PlainLM, SeparateQKV, relative_difference, separate, tiny_gpt, token_batches, train
from torch import nn

from lightning_adapm import AdaPM, PartialMuon
from lightning_adapm.moments import orthogonal
from lightning_adapm.moments.nesterov import NesterovLowRankMomentum, NesterovMomentum
from lightning_adapm.moments.orthogonal import newton_schulz
from lightning_adapm.moments.quantized import decoded_from


def moved_along(direction, weight, lr=1e-2, decay=0.1):
    m, n = weight.shape
    return (1 - lr * decay) * weight - lr * 0.2 * max(m, n) ** 0.5 * newton_schulz(direction[None])[0]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("iteration", ["own", "shared"])
def test_full_momentum_is_torch_muon_beside_adamw(iteration, nesterov, monkeypatch):
    """20 steps in float32. Both round their products to bfloat16, but not the same products: the tolerance is a
    twentieth of what all steps moved. With one iteration for both, nothing but rounding in float32 is left."""
    from torch.optim import _muon

    tolerance = {"own": 0.05, "shared": 1e-4}[iteration]
    if iteration == "shared":
        monkeypatch.setattr(orthogonal, "product_dtype", lambda *_: torch.float32)
        monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda update, *_: newton_schulz(update[None])[0])
    torch.manual_seed(0)
    model = PlainLM()
    theirs, start = copy.deepcopy(model), copy.deepcopy(model)
    ours = PartialMuon(
        model.parameters(), lr=2e-3, nesterov=nesterov, momentum="full", second_moment="elementwise", weight_decay=0.1
    )
    named = list(theirs.named_parameters())
    muon = torch.optim.Muon(
        [p for name, p in named if hidden(name, p)],
        lr=2e-3,
        momentum=0.95,
        nesterov=nesterov,
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    rest = [p for name, p in named if not hidden(name, p)]
    adamw = torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)

    class Both:
        def zero_grad(self):
            muon.zero_grad(), adamw.zero_grad()

        def step(self):
            muon.step(), adamw.step()

    batches = token_batches(20)
    losses = train(model, ours, batches), train(theirs, Both(), batches)
    assert losses[0] == pytest.approx(losses[1], rel=tolerance / 10)
    for (name, p), (_, q), (_, r) in zip(model.named_parameters(), named, start.named_parameters(), strict=True):
        if name.endswith("k_proj.bias"):  # its gradient is rounding
            continue
        assert (p - q).norm() <= tolerance * (q - r).norm(), name


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize("adjusted", [True, False])
def test_goes_on_from_torch_muon(adjusted):
    weight, other = (nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(3))) for _ in range(2))
    muon = torch.optim.Muon([weight], lr=2e-3, momentum=0.9, adjust_lr_fn="match_rms_adamw" if adjusted else None)
    for _ in steps(weight, muon, 5):
        pass
    ours = PartialMuon([(WEIGHT, other)], lr=5e-3, momentum="full")
    low_rank = PartialMuon([(WEIGHT, other)], lr=5e-3, rank=4, state_dtype=None)
    for optimizer in (ours, low_rank):
        with pytest.warns(UserWarning, match=r"goes on with .*mu=0.9 \(the code has 0.95\)") as said:
            optimizer.load_state_dict(muon.state_dict())
        (words,) = [str(each.message) for each in said]
        assert ("lr=0.002" in words, "lr=" in words) == (adjusted, adjusted)
    (group,) = ours.param_groups
    assert (group["mu"], group["eps"], group["lr"]) == (0.9, 1e-8, 2e-3 if adjusted else 5e-3)
    buffer = muon.state[weight]["momentum_buffer"]
    assert torch.equal(ours.state[other]["exp_avg"], buffer)
    left, right = (low_rank.state[other][key] for key in ("exp_avg_l", "exp_avg_r"))
    best = torch.linalg.svdvals(buffer)[4:].norm()
    assert (buffer - left @ right).norm() < 1.1 * best
    for optimizer, param in ((ours, other), (low_rank, other)):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.isfinite().all()


def test_goes_on_from_adapm():
    """Momentum stays where both keep it; hidden matrices lose their second moments, tables get their means."""
    torch.manual_seed(0)
    model, same = PlainLM(), {"rank": 2, "state_dtype": None}
    adapm, ours = AdaPM(model.parameters(), **same), PartialMuon(model.parameters(), **same)
    train(model, adapm, token_batches(4))
    with pytest.warns(UserWarning, match="PartialMuon goes on with betas"):
        ours.load_state_dict(adapm.state_dict())
    params = dict(model.named_parameters())
    weight, table, out = (params[name] for name in (WEIGHT, "embed_tokens.weight", "layers.0.self_attn.o_proj.weight"))
    for key in ("exp_avg_l", "exp_avg_r"):
        assert torch.equal(ours.state[weight][key], adapm.state[weight][key])
    assert "exp_avg_sq" not in ours.state[weight] and set(ours.state[out]) == {"step"}
    torch.testing.assert_close(ours.state[table]["exp_avg_sq"], adapm.state[table]["exp_avg_sq"].mean(1, keepdim=True))
    train(model, ours, token_batches(1))
    assert ours.state[weight]["step"] == 5


def test_goes_on_from_the_former_defaults():
    """Factors of a table become full momentum in eight bits, and Newton-Schulz is the checkpoint's."""
    torch.manual_seed(0)
    model = PlainLM()
    tables = {"embedding": "low_rank", "lm_head": "low_rank"}
    former = {"rank": 2, "momentum": tables, "state_dtype": {"low_rank": "bfloat16"}, "newton_schulz": "muon"}
    before, ours = PartialMuon(model.parameters(), **former), PartialMuon(model.parameters(), rank=2)
    train(model, before, token_batches(3))
    with pytest.warns(UserWarning, match=r"newton_schulz=muon \(the code has fast\)"):
        ours.load_state_dict(before.state_dict())
    table = model.get_parameter("embed_tokens.weight")
    old, new = before.state[table], ours.state[table]
    momentum = decoded_from(new["exp_avg_codes"], new["exp_avg_scale"])
    assert relative_difference(momentum, old["exp_avg_l"].float() @ old["exp_avg_r"].float()) < 0.02
    assert all(group["ns_steps"] == 5 for group in ours.param_groups)
    train(model, ours, token_batches(1))
    assert new["step"] == 4


def test_adapm_cannot_go_on_from_a_state_without_second_moments():
    weight, optimizer = one_weight(rank=2)
    for _ in steps(weight, optimizer, 1):
        pass
    with pytest.raises(ValueError, match="mlp.0.weight has no second moment, which exp_avg_sq cannot do without"):
        AdaPM([(WEIGHT, weight)], rank=2).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "options", [{"rank": 2, "update_proj_gap": 3, "state_dtype": None}, {"momentum": "full"}, {"momentum": "none"}]
)
def test_a_fused_weight_is_its_parts(options):
    torch.manual_seed(0)
    fused = tiny_gpt().double()
    apart = separate(copy.deepcopy(fused)).double()
    train(fused, PartialMuon(fused.parameters(), lr=1e-2, **options), token_batches(8))
    train(apart, PartialMuon(apart.named_parameters(), lr=1e-2, **options), token_batches(8))
    for block, other in zip(fused.transformer.h, apart.transformer.h, strict=True):
        assert isinstance(other.attn.qkv, SeparateQKV)
        joined = torch.cat([linear.weight for linear in other.attn.qkv.children()])
        assert relative_difference(block.attn.qkv.weight, joined) < 1e-9


def test_a_stack_is_its_matrices():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 12, 8, dtype=torch.float64))
    matrices = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    options = {"lr": 1e-2, "rank": 2, "update_proj_gap": 3, "state_dtype": None}
    optimizer = PartialMuon([("h.0.mlp.experts", stack)], **options)
    apart = PartialMuon(
        [(f"h.0.mlp.{name}.weight", matrix) for name, matrix in zip("abc", matrices, strict=True)], **options
    )
    for _ in range(7):
        stack.grad = torch.randn_like(stack)
        for matrix, grad in zip(matrices, stack.grad, strict=True):
            matrix.grad = grad.clone()
        optimizer.step(), apart.step()
    torch.testing.assert_close(stack, torch.stack(matrices), rtol=1e-9, atol=1e-12)


def test_the_whole_rank_is_full_momentum():
    results = []
    for options in ({"rank": 16}, {"rank": 1.0}, {"momentum": "full"}):
        weight, optimizer = one_weight(**options)
        for _ in steps(weight, optimizer):
            pass
        results.append(weight.detach())
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])


def test_a_basis_of_all_columns_sees_what_full_momentum_does():
    """Once the bias of the average is gone: Muon does not correct it."""
    torch.manual_seed(0)
    grads = [torch.randn(12, 8, dtype=torch.float64) for _ in range(30)]
    low, full = NesterovLowRankMomentum(8, 0.5, 4), NesterovMomentum(0.5)
    states = [momentum.make(grads[0].shape, grads[0]) for momentum in (low, full)]
    for step, grad in enumerate(grads, 1):
        ours, theirs = (
            momentum.direction([grad.clone()], [state], step).multiplied().tensors[0]
            for momentum, state in zip((low, full), states, strict=True)
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_without_momentum():
    weight, optimizer = one_weight(momentum="none")
    expected = weight.detach().clone()
    for _, grad in steps(weight, optimizer):
        expected = moved_along(grad, expected)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)
    assert set(optimizer.state[weight]) == {"step"}


@pytest.mark.parametrize("nesterov", [True, False])
def test_full_momentum(nesterov):
    weight, optimizer = one_weight(momentum="full", nesterov=nesterov, mu=0.9)
    expected, average = weight.detach().clone(), torch.zeros_like(weight)
    for _, grad in steps(weight, optimizer):
        average = 0.9 * average + 0.1 * grad
        expected = moved_along(0.1 * grad + 0.9 * average if nesterov else average, expected)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_low_rank_momentum(nesterov, shape):
    weight, optimizer = one_weight(*shape, rank=3, update_proj_gap=4, nesterov=nesterov)
    expected, left, basis = weight.detach().clone(), torch.zeros(shape[0], 3, dtype=torch.float64), None
    for step, grad in steps(weight, optimizer):
        if step > 1:
            torch.testing.assert_close(weight.detach(), expected, rtol=1e-9, atol=1e-12)
            basis = optimizer.state[weight]["exp_avg_r"].clone()
        if basis is None or (step - 1) % 4 == 0:  # the new basis shows only after the step
            twin, twin_optimizer = (
                copy.deepcopy((weight, optimizer))
                if step > 1
                else one_weight(*shape, rank=3, update_proj_gap=4, nesterov=nesterov)
            )
            twin.grad = grad.clone()
            twin_optimizer.step()
            old, old_left, basis = basis, left, twin_optimizer.state[twin]["exp_avg_r"]
            left = old_left @ old @ basis.T if old is not None else left
            lost = 0 if old is None else old_left @ old - left @ basis
        else:
            lost = 0
        seen = grad @ basis.T
        left = 0.95 * left + 0.05 * seen
        inside = left / (1 - 0.95**step)
        ahead = 0.05 * seen + 0.95 * inside if nesterov else inside
        paid = (0.95 if nesterov else 1) * 0.95 / 0.05
        expected = moved_along(ahead @ basis + grad - seen @ basis + paid * lost, expected)


def test_what_is_not_a_hidden_matrix_takes_adams_update():
    torch.manual_seed(0)
    model = PlainLM()
    theirs = copy.deepcopy(model)
    ours = PartialMuon(model.parameters(), lr=1e-2, eps=1e-6, second_moment="elementwise", momentum="full", rank=2)
    rest = {name for name, param in model.named_parameters() if not hidden(name, param)}
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step(), adamw.step()
    for (name, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        if name in rest:
            torch.testing.assert_close(p, q)
        else:
            assert relative_difference(p, q) > 1e-3, name


def test_the_size_of_a_gradient_does_not_matter():
    moved = []
    for scale in (1.0, 1e20, 1e-20):
        weight, optimizer = one_weight(dtype=torch.float32, rank=2, update_proj_gap=3)
        for _ in steps(weight, optimizer):
            weight.grad *= scale
        moved.append(weight.detach())
    assert relative_difference(moved[1], moved[0]) < 0.02
    assert relative_difference(moved[2], moved[0]) < 0.02


@pytest.mark.parametrize("policy", ["none", "full", "low_rank"])
def test_a_zero_or_broken_gradient_moves_nothing(policy):
    for value in (0.0, float("nan"), float("inf")):
        weight, optimizer = one_weight(momentum=policy, rank=2, weight_decay=0.0)
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, value)
        optimizer.step()
        assert torch.equal(weight.detach(), before)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv1d(4, 6, 3)


def test_convolutions_on_request():
    torch.manual_seed(0)
    for wanted in (False, True):
        model = Convolutions()
        optimizer = PartialMuon(
            [{"params": model.named_parameters(), "role": "mlp"}],
            lr=1e-2,
            momentum="none",
            convolutions=wanted,
            newton_schulz="muon",
        )
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        before, grad = model.conv1.weight.detach().clone(), model.conv1.weight.grad
        optimizer.step()
        moved = moved_along(grad.flatten(1), before.flatten(1)).view_as(before)
        assert (relative_difference(model.conv1.weight, moved) < 1e-4) is wanted
        assert ("exp_avg_sq" in optimizer.state[model.conv2.weight]) is not wanted
