"""AdaPM reduces to optimizers that are known: the exact checks on which everything else stands."""

import copy

import pytest
import torch
from adam_mini import Adam_mini
from models import PlainLM, gpt_loss, relative_difference, separate, tiny_gpt, token_batches, train

from lightning_adapm import AdaPM
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum
from lightning_adapm.roles.piece import ROLES

FULL = dict.fromkeys(ROLES, "full")


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module, tolerance: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert relative_difference(p, q) <= tolerance, name


def test_all_full_is_adamw():
    ours, theirs = PlainLM(), PlainLM()
    theirs.load_state_dict(ours.state_dict())

    def groups(model):
        named = list(model.named_parameters())
        return [
            {"params": [(n, p) for n, p in named if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in named if p.dim() < 2], "weight_decay": 0.0, "lr": 1e-3},
        ]

    adapm = AdaPM(groups(ours), lr=3e-3, betas=(0.9, 0.99), momentum=FULL)
    adamw = torch.optim.AdamW(groups(theirs), lr=3e-3, betas=(0.9, 0.99))
    batches = token_batches(50)
    train(ours, adapm, batches)
    train(theirs, adamw, batches)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6 * q.abs().max()


def test_all_full_is_adamw_when_gradients_jump():
    """No clamp where momentum is full: AdamW's own update exceeds 3 lr after a jump, and so must ours."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    adapm, adamw = AdaPM([("mlp.weight", p)], momentum="full"), torch.optim.AdamW([q])
    for step in range(300):
        p.grad = torch.randn(6, 5, generator=generator) * (1e4 if step % 100 == 99 else 1.0)
        q.grad = p.grad.clone()
        adapm.step()
        adamw.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20), (3, 20, 8)])
@pytest.mark.parametrize("gap", [1, 7])
def test_full_rank_is_adamw_first_moment(shape, gap):
    low_rank, full = LowRankMomentum(shape[-1], 0.9, gap), FullMomentum(0.9)
    like = torch.empty(())
    states = [m.make(torch.Size(shape), like) for m in (low_rank, full)]
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 40):
        grad = torch.randn(shape, generator=generator)
        ours = low_rank.direction([grad], states[:1], step)
        theirs = full.direction([grad], states[1:], step)
        assert relative_difference(ours.multiplied().tensors[0], theirs.tensors[0] * theirs.scale) <= 1e-5


def test_block_with_full_momentum_is_adam_mini():
    ours = PlainLM(n_query_groups=2).double()
    theirs = copy.deepcopy(ours)
    for name, _ in ours.named_parameters():
        assert ("mlp" in name) + ("proj" in name) + ("norm" in name) + ("embed" in name) + ("lm_head" in name) == 1, (
            name
        )
    adapm = AdaPM(
        ours.named_parameters(),
        lr=3e-3,
        weight_decay=0.1,
        momentum=FULL,
        second_moment="block",
        no_decay=("norm", "bias"),
    )
    mini = Adam_mini(
        theirs.named_parameters(), lr=3e-3, weight_decay=0.1, dim=32, n_heads=4, n_kv_heads=2, verbose=False
    )
    batches = token_batches(50)
    losses = train(ours, adapm, batches)
    train(theirs, mini, batches)
    assert losses[-1] < losses[0] - 0.5
    assert_same_weights(ours, theirs, 1e-9)


@pytest.mark.parametrize("gap", [1, 6])
def test_without_debias_is_a_plain_low_rank_average(gap):
    momentum, grads = LowRankMomentum(3, 0.9, gap, debias=False), torch.randn(20, 12, 9, dtype=torch.float64)
    state = momentum.make(grads[0].shape, grads)
    average = torch.zeros(12, 9, dtype=torch.float64)
    for step, grad in enumerate(grads, start=1):
        direction = momentum.direction([grad], [state], step).multiplied().tensors[0]
        basis = state["exp_avg_r"]
        average = (0.9 * average + 0.1 * grad) @ basis.T @ basis
        torch.testing.assert_close(direction, average / (1 - 0.9**step))
    assert torch.linalg.matrix_rank(direction) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_gradient_between_refreshes(dtype):
    """From the first step while the basis stays, and again once a later basis has filled."""
    momentum, grad = LowRankMomentum(4, 0.9, 400), torch.randn(30, 20, dtype=dtype)
    state = momentum.make(grad.shape, grad)
    exact = 1e-6 if dtype == torch.float32 else 1e-14
    for step in range(1, 801):
        direction = momentum.direction([grad], [state], step).multiplied().tensors[0]
        if step <= 400 or step > 740:
            assert relative_difference(direction, grad) <= exact, step


def test_flush_keeps_the_total_displacement():
    """What leaves the subspace at a refresh is paid at once: the summed directions are those of a full average."""
    low_rank, full = LowRankMomentum(2, 0.9, 5), FullMomentum(0.9)
    grads = torch.randn(30, 8, 6, dtype=torch.float64)
    states = [m.make(grads[0].shape, grads) for m in (low_rank, full)]
    padded = torch.cat([grads, torch.zeros(400, 8, 6, dtype=torch.float64)])  # let every average run out
    offset = 10_000  # no bias correction left
    ours = sum(low_rank.direction([g], states[:1], offset + t).multiplied().tensors[0] for t, g in enumerate(padded, 1))
    theirs = sum(
        (d := full.direction([g], states[1:], offset + t)).tensors[0] * d.scale for t, g in enumerate(padded, 1)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_is_separate(second_moment, heads, dtype):
    torch.manual_seed(1)
    fused = tiny_gpt(n_head=heads[0], n_query_groups=heads[1], head_size=8, n_embd=48).to(dtype)
    apart = separate(copy.deepcopy(fused))
    batches = token_batches(30)
    for model in (fused, apart):
        options = {"rank": 2, "update_proj_gap": 10, "second_moment": second_moment, "state_dtype": None}
        train(model, AdaPM(model.parameters(), lr=3e-3, **options), batches)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for a, b in zip(fused.transformer.h, apart.transformer.h, strict=True):
        q, k, v = (getattr(b.attn.qkv, f"{name}_proj").weight for name in "qkv")
        assert relative_difference(a.attn.qkv.weight, torch.cat([q, k, v])) <= tolerance
        assert relative_difference(a.mlp.fc_1.weight, b.mlp.fc_1.weight) <= tolerance
    assert (gpt_loss(fused, batches[0]) - gpt_loss(apart, batches[0])).abs() <= tolerance * 10


def test_a_stack_of_experts_is_its_matrices():
    stack = torch.nn.Parameter(torch.randn(3, 12, 10, dtype=torch.float64))
    single = [torch.nn.Parameter(stack.detach()[i].clone()) for i in range(3)]
    for second_moment in ("elementwise", "block", "factored"):
        options = {"rank": 2, "update_proj_gap": 4, "second_moment": second_moment, "state_dtype": None}
        together = AdaPM([("mlp.experts.weight", stack)], **options)
        apart = [AdaPM([(f"mlp.experts.{i}.weight", p)], **options) for i, p in enumerate(single)]
        for step in range(9):
            stack.grad = torch.randn_like(stack)
            if step < 2:
                stack.grad[1] = 0.0  # an expert that no token reaches yet
            together.step()
            for i, optimizer in enumerate(apart):
                single[i].grad = stack.grad[i].clone()
                optimizer.step()
        torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]))


def test_a_callers_autocast_does_not_reach_the_step():
    plain = PlainLM()
    twin = copy.deepcopy(plain)
    for model, enabled in ((plain, False), (twin, True)):
        optimizer = AdaPM(model.parameters(), rank=2)
        model(token_batches(1)[0]).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
    assert_same_weights(plain, twin, 0.0)


def test_what_rounding_to_bfloat16_costs():
    """As docs/choosing-a-policy.md states it: a stored average settles beside a constant gradient."""
    grad = torch.randn(200, 150, generator=torch.Generator().manual_seed(0))
    momentum = FullMomentum(0.9)
    for dtype, low, high in ((torch.bfloat16, 0.015, 0.03), (torch.float32, 0.0, 1e-5)):
        state = momentum.make(grad.shape, torch.empty((), dtype=dtype))
        for step in range(1, 300):
            momentum.direction([grad], [state], step)
        assert low <= relative_difference(state["exp_avg"], grad) <= high


def test_refreshes_are_staggered_over_the_blocks():
    """The subspaces of a block change in one step of every ``update_proj_gap``, those of every second block half a gap
    later.
    """
    model = tiny_gpt(n_layer=5)
    optimizer = AdaPM(model.named_parameters(), rank=2, update_proj_gap=7)
    changes: dict[int, set[tuple[int, ...]]] = {}
    steps: dict[str, list[int]] = {name: [] for name, _ in model.named_parameters() if ".h." in name}
    for step, tokens in enumerate(token_batches(22), start=1):
        old = {key: value.clone() for key, value in bases(model, optimizer).items()}
        train(model, optimizer, [tokens])
        for (name, key), basis in bases(model, optimizer).items():
            if step > 1 and not torch.equal(basis, old[name, key]) and step not in steps[name]:
                steps[name].append(step)
    for name, changed in steps.items():
        if changed:
            changes.setdefault(int(name.split(".")[2]), set()).add(tuple(changed))
    assert changes == {block: {tuple(range(1 + block % 2 * 3, 23, 7)[block % 2 == 0 :])} for block in range(5)}


def bases(model, optimizer):
    """Every basis by its parameter's name and its key, in the blocks."""
    return {
        (name, key): value
        for name, param in model.named_parameters()
        for key, value in optimizer.state[param].items()
        if key.endswith("exp_avg_r") and ".h." in name
    }
