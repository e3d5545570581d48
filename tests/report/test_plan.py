"""The bytes that are promised are the bytes that are there."""

import pytest
import torch
from litgpt import GPT, Config
from litgpt.lora import GPT as LoRAGPT  # noqa: N811
from litgpt.lora import Config as LoRAConfig
from litgpt.lora import mark_only_lora_as_trainable
from models import PlainLM, tiny_gpt, token_batches, train
from torch import nn

from lightning_adapm import AdaPM, PartialMuon
from lightning_adapm.report.explain import compare, explain
from lightning_adapm.report.plan import StateBytes, adamw_bytes, measure, plan


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize("model", [PlainLM(), tiny_gpt(), tiny_gpt().bfloat16()], ids=["plain", "litgpt", "bf16"])
def test_plan_is_what_training_allocates(model, second_moment, state_dtype):
    optimizer = AdaPM(model.parameters(), second_moment=second_moment, state_dtype=state_dtype)
    rows = plan(optimizer)
    assert not optimizer.state
    train(model, optimizer, token_batches(2))
    assert sum((row.bytes for row in rows), StateBytes()) == measure(optimizer)
    stored = {
        id(v.untyped_storage()): v.untyped_storage().nbytes()
        for s in optimizer.state.values()
        for v in s.values()
        if isinstance(v, torch.Tensor)
    }
    assert sum(stored.values()) == measure(optimizer).total  # no view keeps something larger alive
    assert sum(row.numel for row in rows) == sum(p.numel() for p in model.parameters())


def test_adamw_column_is_what_adamw_allocates():
    model = PlainLM()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, token_batches(1))
    assert adamw_bytes(p.shape for p in model.parameters()) == measure(adamw)
    assert sum((row.adamw for row in plan(AdaPM(model.parameters()))), StateBytes()) == measure(adamw)


PAPER = {"momentum": "paper", "rank": 0.05, "state_dtype": None}
COMPACT = {"momentum": "compact", "rank": 0.1, "state_dtype": {"low_rank": "bfloat16"}}


@pytest.mark.parametrize(
    ("name", "options", "momentum", "total"),
    [
        ("pythia-160m", {}, 0.823, 0.911),
        ("Llama-3-8B", {}, 0.902, 0.951),
        ("Llama-3-8B", COMPACT, 0.917, 0.958),
        ("Llama-3-8B", COMPACT | {"state_dtype": "bfloat16"}, 0.925, 0.963),
        ("Llama-3-8B", PAPER, 0.927, 0.963),
        ("Llama-3-8B", PAPER | {"state_dtype": "bfloat16"}, 0.963, 0.982),
        ("Llama-3-8B", PAPER | {"state_dtype": "int8"}, 0.976, 0.988),
    ],
)
def test_savings_on_models_of_the_field(name, options, momentum, total):
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    rows = plan(AdaPM(model.parameters(), second_moment="block", **options))
    ours, adamw = (sum((getattr(row, key) for row in rows), StateBytes()) for key in ("bytes", "adamw"))
    assert 1 - ours.momentum / adamw.momentum == pytest.approx(momentum, abs=1e-3)
    assert 1 - ours.total / adamw.total == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "momentum", "total"),
    [
        ({}, 0.886, 0.943),
        ({"rank": 0.03}, 0.894, 0.947),
        (COMPACT, 0.855, 0.927),
        (PAPER, 0.865, 0.932),
        (PAPER | {"state_dtype": "bfloat16"}, 0.933, 0.966),
    ],
)
def test_savings_on_gpt2_xl(options, momentum, total):
    with torch.device("meta"):
        size = {"n_layer": 48, "n_head": 25, "n_embd": 1600, "block_size": 1024, "padded_vocab_size": 50257}
        model = GPT(Config(**size, parallel_residual=False))
        model.lm_head.weight = model.transformer.wte.weight
        model.wpe = nn.Embedding(1024, 1600)
    rows = plan(AdaPM(model.named_parameters(), second_moment="block", **options))
    ours, adamw = (sum((getattr(row, key) for row in rows), StateBytes()) for key in ("bytes", "adamw"))
    assert 1 - ours.momentum / adamw.momentum == pytest.approx(momentum, abs=1e-3)
    assert 1 - ours.total / adamw.total == pytest.approx(total, abs=1e-3)


def test_frozen_parameters_have_no_row():
    model = PlainLM()
    model.layers.requires_grad_(False)
    assert {row.name for row in plan(AdaPM(model.parameters()))} == {
        "embed_tokens.weight", "norm.weight", "norm.bias", "lm_head.weight"
    }  # fmt: skip


def tied():
    model = tiny_gpt()
    model.lm_head.weight = model.transformer.wte.weight
    return model


def experts():
    return tiny_gpt(mlp_class_name="LLaMAMoE", n_expert=3, n_expert_per_token=2)


def with_lora():
    config = tiny_gpt().config
    lora = {"lora_r": 2, "lora_alpha": 4, "lora_query": True, "lora_value": True, "lora_mlp": True}
    fields = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_query_groups", "n_embd", "block_size")}
    model = LoRAGPT(LoRAConfig(**fields, **lora, padded_vocab_size=61, mlp_class_name="LLaMAMLP", intermediate_size=48))
    mark_only_lora_as_trainable(model)
    return model


@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [PlainLM, tiny_gpt, tied, experts, with_lora])
def test_every_column_is_what_training_allocates(make, dtype, state_dtype):
    model = make().to(dtype)
    options = {"rank": 0.1, "state_dtype": state_dtype}
    planned = compare(model, **options)
    optimizers = {
        "AdaPM": (AdaPM, {}),
        "AdaPM factored": (AdaPM, {"second_moment": "factored"}),
        "Adam-mini": (AdaPM, {"second_moment": "block", "momentum": "full"}),
        "PartialMuon": (PartialMuon, {}),
    }
    assert planned.keys() == optimizers.keys()
    for name, (make_optimizer, settings) in optimizers.items():
        optimizer = make_optimizer(model.named_parameters(), **options, **settings)
        # a gradient for every parameter, used in this batch or not
        for param in model.parameters():
            param.grad = torch.ones_like(param) if param.requires_grad else None
        optimizer.step()
        assert planned[name].total == measure(optimizer), name
        assert list(planned[name]) == list(explain(optimizer)), name
    adamw = torch.optim.AdamW(param for param in model.parameters() if param.requires_grad)
    adamw.step()
    assert planned["AdaPM"].adamw_in_dtype == measure(adamw)


@pytest.mark.parametrize("make", [tiny_gpt, with_lora])
def test_a_backward_pass_allocates_what_is_planned(make):
    model = make()
    optimizer = AdaPM(model.named_parameters())
    train(model, optimizer, token_batches(1))
    assert measure(optimizer) == explain(make()).total


def test_planning_with_changes_leaves_the_optimizer_as_it_is():
    optimizer = AdaPM(tiny_gpt().named_parameters())
    before = plan(optimizer)
    assert plan(optimizer, {"second_moment": "block"}) != before
    assert plan(optimizer) == before
