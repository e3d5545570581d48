"""Properties that hold for every shape, layout, role, setting and gradient."""

import warnings

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_adapm import AdaPM
from lightning_adapm.moments.storage import decoded
from lightning_adapm.roles.piece import ROLES


class Conv1D(nn.Module):
    """As Hugging Face's: outputs are columns."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


GRADIENTS = {
    "normal": lambda shape: torch.randn(shape),
    "zero": lambda shape: torch.zeros(shape),
    "none": lambda shape: None,
    "rank one": lambda shape: torch.randn(shape[0], 1) @ torch.randn(1, shape[1]),
    "sparse columns": lambda shape: torch.randn(shape) * (torch.arange(shape[1]) % 3 == 0),
    "sparse rows": lambda shape: torch.randn(shape) * (torch.arange(shape[0]) % 3 == 0)[:, None],
    "tiny": lambda shape: torch.randn(shape) * 1e-30,
    "huge": lambda shape: torch.randn(shape) * 1e30,
    "an infinity": lambda shape: with_one(shape, float("inf")),
    "a NaN": lambda shape: with_one(shape, float("nan")),
    "all NaN": lambda shape: torch.full(shape, float("nan")),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Names that say how the rows (of the last one: the columns) of a fused weight are arranged.
FUSED = ("attn.qkv", "attn.query_key_value", "attn.attn", "attn.c_attn")


def with_one(shape: tuple[int, int], bad: float) -> Tensor:
    grad = torch.randn(shape)
    grad[torch.randint(shape[0], ()), torch.randint(shape[1], ())] = bad
    return grad


@st.composite
def matrices(draw):
    """A parameter group of one weight with one role."""
    weight = nn.Parameter(torch.randn(draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))))
    role = draw(st.sampled_from([role for role in ROLES if role not in ("norm", "bias")]))
    return {"params": [weight], "role": role, "n_head": 1}


@st.composite
def fused(draw):
    """A parameter group of one fused query, key and value weight."""
    groups, queries, head_size = (draw(st.integers(1, top)) for top in (3, 3, 5))
    shape = (groups * (queries + 2) * head_size, draw(st.integers(1, 20)))
    name = draw(st.sampled_from(FUSED))
    weight = nn.Parameter(torch.randn(shape[::-1] if name == "attn.c_attn" else shape))
    module = Conv1D(weight) if name == "attn.c_attn" else nn.Linear(1, 1, bias=False)
    module.weight = weight
    for part in reversed(name.split(".")):
        module = nn.ModuleDict({part: module})
    heads = {"n_head": groups * queries, "n_query_groups": groups, "head_size": head_size}
    return {"params": module.named_parameters(), **heads}


@settings(max_examples=400, deadline=None)
@given(
    group=st.one_of(matrices(), fused()),
    dtype=st.sampled_from(DTYPES),
    rank=st.one_of(st.integers(1, 30), st.floats(0.01, 1.0)),
    gap=st.integers(1, 5),
    second_moment=st.sampled_from(["elementwise", "block", "factored"]),
    debias=st.booleans(),
    state_dtype=st.sampled_from([None, "bfloat16", "int8"]),
    policy=st.sampled_from([None, "none", "low_rank", "full"]),
    kinds=st.lists(st.sampled_from(sorted(GRADIENTS)), min_size=1, max_size=20),
    seed=st.integers(0, 10**6),
)
def test_no_gradient_breaks_a_step(group, dtype, rank, gap, second_moment, debias, state_dtype, policy, kinds, seed):
    """Over about four thousand steps nothing becomes NaN, and no clamped update exceeds its bound."""
    torch.manual_seed(seed)
    lr, clip = 2.0**-7, 2.0
    options = {"rank": rank, "update_proj_gap": gap, "second_moment": second_moment, "debias": debias}
    optimizer = AdaPM(
        [group], lr=lr, weight_decay=0.0, momentum=policy, clip_threshold=clip, state_dtype=state_dtype, **options
    )
    (weight,) = optimizer.param_groups[0]["params"]
    weight.data = weight.data.to(dtype)
    broken = 0
    for kind in kinds:
        before = weight.detach().double().clone()
        grad = GRADIENTS[kind](tuple(weight.shape))
        weight.grad = None if grad is None else grad.to(dtype)
        broken += weight.grad is not None and not weight.grad.isfinite().all()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "AdaPM.step\\(\\) found no gradient")
            optimizer.step()
        assert weight.isfinite().all(), kind
        state = decoded(optimizer.state[weight])
        for key, value in state.items():
            assert not torch.as_tensor(value).isnan().any(), (kind, key)
        if not any(key.rpartition(".")[2] == "exp_avg" for key in state):
            rounding = torch.finfo(dtype).eps * before.abs().max() * 2
            bound = lr * clip * (10 if group.get("role") == "embedding" and policy in (None, "none") else 1)
            assert (weight.double() - before).abs().max() <= bound * (1 + 1e-6) + rounding
        for key in (key for key in state if key.endswith("exp_avg_r")):
            basis = state[key].double()
            gram = basis @ basis.mT
            alive = torch.diag((gram.diagonal() > 0.25).double())
            assert (gram - alive).abs().max() < (2e-2 if state_dtype else 1e-5)
    counted = optimizer.nonfinite_gradients().values()
    assert max(counted, default=0) <= broken <= sum(counted)


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
    options = {"eps": 0.0, "rank": 2, "update_proj_gap": 3, "second_moment": second_moment, "state_dtype": None}
    optimizers = [AdaPM([("mlp.weight", w)], **options) for w in weights]
    for _ in range(7):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        for weight, optimizer, factor in zip(weights, optimizers, (1.0, scale), strict=True):
            weight.grad = grad * factor
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-9)
