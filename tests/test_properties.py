"""Properties that hold for every shape, role, setting and gradient."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_adapm import AdaPM
from lightning_adapm.roles import ROLES

GRADIENTS = {
    "normal": lambda shape: torch.randn(shape),
    "zero": lambda shape: torch.zeros(shape),
    "rank one": lambda shape: torch.randn(shape[0], 1) @ torch.randn(1, shape[1]),
    "sparse columns": lambda shape: torch.randn(shape) * (torch.arange(shape[1]) % 3 == 0),
    "sparse rows": lambda shape: torch.randn(shape) * (torch.arange(shape[0]) % 3 == 0)[:, None],
    "tiny": lambda shape: torch.randn(shape) * 1e-30,
    "huge": lambda shape: torch.randn(shape) * 1e30,
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    role=st.sampled_from([role for role in ROLES if role not in ("norm", "bias")]),
    rank=st.one_of(st.integers(1, 30), st.floats(0.01, 1.0)),
    gap=st.integers(1, 5),
    second_moment=st.sampled_from(["elementwise", "block", "factored"]),
    debias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    state_dtype=st.sampled_from([None, "bfloat16"]),
    policy=st.sampled_from(["none", "low_rank", "full"]),
    kinds=st.lists(st.sampled_from(sorted(GRADIENTS)), min_size=1, max_size=12),
    seed=st.integers(0, 10**6),
)
def test_no_gradient_breaks_a_step(
    shape, role, rank, gap, second_moment, debias, dtype, state_dtype, policy, kinds, seed
):
    """Nothing becomes NaN, and no clamped update exceeds its bound."""
    torch.manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    options = {"rank": rank, "update_proj_gap": gap, "second_moment": second_moment, "debias": debias}
    group = {"params": [weight], "role": role, "n_head": 1}
    lr, clip = 2.0**-7, 2.0
    optimizer = AdaPM(
        [group],
        lr=lr,
        weight_decay=0.0,
        momentum={role: policy},
        clip_threshold=clip,
        state_dtype=state_dtype,
        **options,
    )
    for kind in kinds:
        before = weight.detach().double().clone()
        weight.grad = GRADIENTS[kind](shape).to(dtype)
        optimizer.step()
        assert weight.isfinite().all(), kind
        state = optimizer.state[weight]
        for key, value in state.items():
            assert not torch.as_tensor(value).isnan().any(), (kind, key)
        if "exp_avg" not in state:
            rounding = torch.finfo(dtype).eps * before.abs().max() * 2
            assert (weight.double() - before).abs().max() <= lr * clip * (1 + 1e-6) + rounding
        if "exp_avg_r" in state:
            basis = state["exp_avg_r"].double()
            gram = basis @ basis.mT
            alive = torch.diag((gram.diagonal() > 0.25).double())
            assert (gram - alive).abs().max() < (2e-2 if state_dtype else 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 20), st.integers(2, 20)),
    second_moment=st.sampled_from(["elementwise", "block", "factored"]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 10**6),
)
def test_updates_do_not_depend_on_the_scale_of_the_gradients(shape, second_moment, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for _ in range(2)]
    optimizers = [
        AdaPM([("mlp.weight", w)], eps=0.0, rank=2, update_proj_gap=3, second_moment=second_moment) for w in weights
    ]
    for _ in range(7):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        for weight, optimizer, factor in zip(weights, optimizers, (1.0, scale), strict=True):
            weight.grad = grad * factor
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-9)
