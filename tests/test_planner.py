"""The bytes that are promised are the bytes that are there."""

import pytest
import torch
from litgpt import GPT, Config
from models import PlainLM, tiny_gpt, token_batches, train

from lightning_adapm import AdaPM
from lightning_adapm.planner import StateBytes, adamw_bytes, measure, plan


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("state_dtype", [None, "bfloat16"])
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


@pytest.mark.parametrize(
    ("name", "state_dtype", "momentum", "total"),
    [
        ("pythia-160m", None, 0.914, 0.956),
        ("tiny-llama-1.1b", None, 0.930, 0.965),
        ("Llama-3-8B", None, 0.927, 0.963),
        ("Llama-3-8B", "bfloat16", 0.963, 0.982),
    ],
)
def test_savings_on_models_of_the_field(name, state_dtype, momentum, total):
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    rows = plan(AdaPM(model.parameters(), rank=0.05, second_moment="block", state_dtype=state_dtype))
    ours, adamw = (sum((getattr(row, key) for row in rows), StateBytes()) for key in ("bytes", "adamw"))
    assert 1 - ours.momentum / adamw.momentum == pytest.approx(momentum, abs=1e-3)
    assert 1 - ours.total / adamw.total == pytest.approx(total, abs=1e-3)


def test_frozen_parameters_have_no_row():
    model = PlainLM()
    model.layers.requires_grad_(False)
    assert {row.name for row in plan(AdaPM(model.parameters()))} == {
        "embed_tokens.weight", "norm.weight", "norm.bias", "lm_head.weight"
    }  # fmt: skip
