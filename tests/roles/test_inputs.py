"""What may be passed as ``params``, and what is refused."""

import pytest
import torch
from models import PlainLM, names_alone, tiny_gpt, token_batches, train
from torch import nn

from lightning_adapm import AdaPM

PLAIN_ROLES = {
    "embed_tokens.weight": "embedding",
    "layers.0.norm_1.weight": "norm",
    "layers.0.norm_1.bias": "bias",
    "layers.0.self_attn.q_proj.weight": "query",
    "layers.0.self_attn.q_proj.bias": "bias",
    "layers.0.self_attn.k_proj.weight": "key",
    "layers.0.self_attn.v_proj.weight": "value",
    "layers.0.self_attn.o_proj.weight": "attn_out",
    "layers.1.mlp.0.weight": "mlp",
    "layers.1.mlp.2.weight": "mlp",
    "norm.weight": "norm",
    "lm_head.weight": "lm_head",
}
GPT_ROLES = {
    "lm_head.weight": "lm_head",
    "transformer.wte.weight": "embedding",
    "transformer.h.0.norm_1.weight": "norm",
    "transformer.h.0.attn.qkv.weight": "qkv",
    "transformer.h.1.attn.proj.weight": "attn_out",
    "transformer.h.1.mlp.fc_1.weight": "mlp",
    "transformer.h.1.mlp.proj.weight": "mlp",
    "transformer.ln_f.weight": "norm",
}


def roles_of(optimizer):
    return {n: r for g in optimizer.param_groups for n, r in zip(g["param_names"], g["roles"], strict=True)}


class Wrapper(nn.Module):
    """As Fabric wraps a model."""

    def __init__(self, module):
        super().__init__()
        self._forward_module = module


@pytest.mark.parametrize(
    ("model", "expected"), [(PlainLM(), PLAIN_ROLES), (tiny_gpt(), GPT_ROLES)], ids=["plain", "litgpt"]
)
@pytest.mark.parametrize(
    "params",
    [
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
        lambda m: list(m.named_parameters()),
        lambda m: dict(m.named_parameters()).items(),
        lambda m: [{"params": m.parameters()}],
        lambda m: [{"params": [(n, p)]} for n, p in m.named_parameters()],
        lambda m: torch.compile(m).parameters(),
        lambda m: Wrapper(torch.compile(m)).parameters(),
    ],
    ids=["generator", "named", "list", "items", "group", "groups", "compiled", "fabric"],
)
def test_roles_from_every_source(model, expected, params):
    optimizer = AdaPM(params(model))
    roles = {
        name.removeprefix("_forward_module.").removeprefix("_orig_mod."): r for name, r in roles_of(optimizer).items()
    }
    assert expected.items() <= roles.items()
    assert len(roles) == len(list(model.parameters()))
    pieces = {p.role: p for p in optimizer.pieces.get(getattr(model, "transformer", model).parameters().__next__(), ())}
    assert pieces


def test_fused_pieces_and_heads_of_litgpt():
    model = tiny_gpt(n_head=6, n_query_groups=2, head_size=8)
    optimizer = AdaPM(model.parameters(), second_moment="block")
    query, key, value = optimizer.pieces[model.transformer.h[0].attn.qkv.weight]
    assert (query.start, query.stop, query.heads) == (0, 48, 6)
    assert (key.start, key.stop, key.heads) == (48, 64, 2)
    assert (value.start, value.stop) == (64, 80)


def test_fused_pieces_from_names_alone_use_the_output_projection():
    model = tiny_gpt(n_head=6, n_query_groups=2, head_size=8)
    named = names_alone(model)
    optimizer = AdaPM(named)
    assert [(p.role, p.start, p.stop) for p in optimizer.pieces[dict(named)["transformer.h.1.attn.qkv.weight"]]] == [
        ("query", 0, 48),
        ("key", 48, 64),
        ("value", 64, 80),
    ]


def test_block_needs_heads_and_takes_them_from_the_group():
    model = tiny_gpt(n_head=6, n_query_groups=2, head_size=8)
    with pytest.raises(ValueError, match="h.0.attn.qkv.weight.* n_head= and n_query_groups="):
        AdaPM(names_alone(model), second_moment="block")
    named = names_alone(model)
    group = {"params": named, "n_head": 6, "n_query_groups": 2, "head_size": 8}
    optimizer = AdaPM([group], second_moment="block")
    assert [p.heads for p in optimizer.pieces[dict(named)["transformer.h.0.attn.qkv.weight"]]] == [6, 2, None]


def test_stated_heads_that_do_not_fit_the_rows_are_refused():
    named = names_alone(tiny_gpt(n_head=6, n_query_groups=2, head_size=8))
    for wrong in ({"head_size": 9}, {"n_query_groups": 3}):
        with pytest.raises(ValueError, match="which rows are whose"):
            AdaPM([{"params": named, "n_head": 6, "n_query_groups": 2, "head_size": 8} | wrong])


def test_a_fused_weight_that_cannot_be_cut_is_refused():
    weight = nn.Parameter(torch.zeros(40, 16))
    with pytest.raises(ValueError, match=r"attn.qkv.weight of shape \(40, 16\).*n_query_groups="):
        AdaPM([("attn.qkv.weight", weight)])


@pytest.mark.parametrize(
    ("name", "shape", "taught"),
    [
        ("self_attn.kv_a_proj_with_mqa.weight", (40, 16), "kv"),  # how many rows are the rotary key's
        ("self_attn.kv_b_proj.weight", (48, 16), "kv"),  # of how many heads
        ("attn.fused.weight", (48, 16), "qkv_interleaved"),
    ],
)
def test_rows_that_need_a_module_are_refused_by_name_alone(name, shape, taught):
    with pytest.raises(ValueError, match=rf"{name} .*which rows are whose is not known"):
        AdaPM([(name, nn.Parameter(torch.zeros(shape)))], roles={name: taught})


def test_gpt2s_fused_weight_is_known_by_its_shape():
    weights = {"h.0.attn.c_attn.weight": torch.zeros(16, 48), "h.0.attn.c_proj.weight": torch.zeros(16, 16)}
    named = {name: nn.Parameter(weight) for name, weight in weights.items()}
    pieces = AdaPM(named.items()).pieces[named["h.0.attn.c_attn.weight"]]
    assert [(piece.role, piece.start, piece.transposed) for piece in pieces] == [
        ("query", 0, True),
        ("key", 16, True),
        ("value", 32, True),
    ]


def test_tied_embedding_is_an_embedding_whatever_its_name():
    model = tiny_gpt()
    model.lm_head.weight = model.transformer.wte.weight
    optimizer = AdaPM(model.parameters())
    assert roles_of(optimizer)["lm_head.weight"] == "embedding"


@pytest.mark.parametrize(
    "params",
    [
        lambda m: list(m.parameters()),
        lambda m: (p for p in m.parameters()),
        lambda m: filter(lambda p: p.requires_grad, m.parameters()),
        lambda m: [{"params": list(m.parameters()), "weight_decay": 0.1}],
    ],
    ids=["list", "generator expression", "filter", "group"],
)
def test_tensors_that_no_module_holds_are_refused(params):
    detached = nn.ParameterList(param for _, param in names_alone(PlainLM()))
    tensors = list(params(detached))  # of a model that is gone when the optimizer is built
    del detached
    with pytest.raises(TypeError, match=r"group 0 .* \(61, 32\) without a name.*Pass model.named_parameters\(\)"):
        AdaPM(tensors)


def test_one_tensor_is_refused_as_by_torch():
    with pytest.raises(TypeError, match="params is one tensor"):
        AdaPM(next(PlainLM().parameters()))


def test_a_started_generator_hands_over_what_is_left_and_an_exhausted_one_nothing():
    model = PlainLM()
    started = model.parameters()
    first = next(started)
    assert set(AdaPM(started).pieces) == set(model.parameters()) - {first}
    exhausted = model.parameters()
    list(exhausted)
    with pytest.raises(ValueError, match="empty parameter list"):
        AdaPM(exhausted)


def test_a_module_without_parameters_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdaPM(torch.nn.Identity().parameters())


def test_a_module_is_refused_with_advice():
    with pytest.raises(TypeError, match=r"named_parameters\(\)"):
        AdaPM(PlainLM())


def test_a_group_with_a_role_needs_no_names():
    weights = [nn.Parameter(torch.randn(12, 10)) for _ in range(2)]
    optimizer = AdaPM(
        [{"params": weights, "role": "mlp"}, {"params": [nn.Parameter(torch.zeros(3, 3))], "role": "none"}]
    )
    assert [g["roles"] for g in optimizer.param_groups] == [["mlp", "mlp"], ["none"]]


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"mixer": nn.Linear(6, 8, bias=False)}) for _ in range(12))
        self.gadget = nn.Parameter(torch.randn(5, 5))
        self.scale = nn.Parameter(torch.ones(5))


def test_unmatched_matrices_are_listed_with_what_to_paste():
    with pytest.raises(ValueError) as error:
        AdaPM(Unknown().named_parameters())
    message = str(error.value)
    assert "13 matrices" in message
    for index in range(12):
        assert f"blocks.{index}.mixer.weight  (8, 6)" in message
    paste = message[message.index("roles={") + len("roles=") : message.index("}") + 1]
    optimizer = AdaPM(Unknown().named_parameters(), roles=eval(paste))
    assert set(roles_of(optimizer).values()) == {"mlp", "full", "norm"}
    assert roles_of(optimizer)["gadget"] == "full"  # a parameter of the module's own


def test_unmatched_policy_says_so_once():
    with pytest.warns(UserWarning, match=r"full momentum to matrices.*gadget \(5, 5\)") as caught:
        optimizer = AdaPM(Unknown().named_parameters(), unmatched="full")
    assert len(caught) == 1
    assert optimizer.param_groups[0]["momentum"]["unmatched"] == "full"


def test_roles_are_taught_by_name():
    optimizer = AdaPM(Unknown().named_parameters(), roles={"mixer": "mlp", "gadget": "none"})
    assert roles_of(optimizer)["blocks.3.mixer.weight"] == "mlp"
    assert roles_of(optimizer)["gadget"] == "none"


def test_frozen_parameters_cost_nothing_and_need_no_role():
    model = Unknown()
    model.gadget.requires_grad_(False)
    model.blocks.requires_grad_(False)
    optimizer = AdaPM(model.parameters())
    model.scale.grad = torch.ones(5)
    optimizer.step()
    assert set(optimizer.state) == {model.scale}


def test_add_param_group_and_unfreezing():
    model = PlainLM()
    model.layers[1].requires_grad_(False)
    rest = [(n, p) for n, p in model.named_parameters() if not n.startswith("lm_head")]
    optimizer = AdaPM(rest, lr=1e-3)
    train(model, optimizer, token_batches(2))
    optimizer.add_param_group({"params": [("lm_head.weight", model.lm_head.weight)], "lr": 1e-2})
    model.layers[1].requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, token_batches(2))
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.state[model.lm_head.weight]["step"] == 2
    assert optimizer.state[model.norm.weight]["step"] == 4
    with pytest.raises(TypeError, match="without a name"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


def test_schedulers_and_litgpt_lr_overwrite():
    model = PlainLM()
    optimizer = AdaPM(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    for _ in range(5):
        train(model, optimizer, token_batches(1))
        scheduler.step()
    for group in optimizer.param_groups:
        group["lr"] = optimizer.defaults["lr"] * 0.0
        group["weight_decay"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, token_batches(1))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_sparse_and_complex_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdaPM(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()
    with pytest.raises(TypeError, match="mlp.weight is complex"):
        AdaPM([("mlp.weight", nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64)))])


def test_pieces_that_factors_would_not_shrink_keep_full_momentum():
    small, large = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(60, 50))
    optimizer = AdaPM([("mlp.0.weight", small), ("mlp.1.weight", large)], rank=4)
    for p in (small, large):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert "exp_avg" in optimizer.state[small]
    assert optimizer.state[large]["exp_avg_l"].shape == (60, 4)


def test_a_step_without_any_gradient_says_so():
    with pytest.warns(UserWarning, match="found no gradient on any of its parameters"):
        AdaPM(PlainLM().parameters()).step()


def test_a_taught_role_is_for_matrices_and_leaves_their_biases_alone():
    model = nn.ModuleDict({"fused": nn.Linear(16, 48)})
    optimizer = AdaPM(model.named_parameters(), roles={"fused": "qkv"})
    assert roles_of(optimizer) == {"fused.weight": "qkv", "fused.bias": "bias"}
    optimizer = AdaPM([{"params": list(model.parameters()), "role": "mlp"}])
    assert list(roles_of(optimizer).values()) == ["mlp", "bias"]
    optimizer = AdaPM(model.named_parameters(), roles={"fused": "none"})
    assert set(roles_of(optimizer).values()) == {"none"}


def test_a_frozen_fused_weight_may_have_rows_that_nothing_tells():
    fused = nn.Parameter(torch.zeros(20, 8), requires_grad=False)
    named = [("attn.qkv.weight", fused), ("attn.norm.weight", nn.Parameter(torch.ones(8)))]
    optimizer = AdaPM(named)
    fused.requires_grad_(True)
    fused.grad = torch.ones_like(fused)
    with pytest.raises(ValueError, match=r"attn.qkv.weight \(20, 8\) now requires a gradient"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"attn.qkv.weight"):
        AdaPM(named)
