"""peft's adapters keep full momentum, and the frozen base they are added to costs no state."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lightning_adapm import AdaPM  # noqa: E402

TARGETS = {"target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
ADAPTERS = {
    "LoRA": lambda: peft.LoraConfig(r=4, **TARGETS),
    "LoRA on everything": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **TARGETS),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **TARGETS),
    "LoHa": lambda: peft.LoHaConfig(r=4, **TARGETS),
    "LoKr": lambda: peft.LoKrConfig(r=4, **TARGETS),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, **TARGETS),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix, projected": lambda: peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    ),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}


def tiny_llama():
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def roles_of(optimizer):
    return {n: r for g in optimizer.param_groups for n, r in zip(g["param_names"], g["roles"], strict=True)}


def train(model, optimizer, steps=2):
    tokens = torch.arange(12).repeat(2, 1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("second_moment", ["elementwise", "block"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_keep_full_momentum_and_the_base_costs_nothing(kind, second_moment):
    model = peft.get_peft_model(tiny_llama(), ADAPTERS[kind]())
    optimizer = AdaPM(model.parameters(), second_moment=second_moment)
    roles = roles_of(optimizer)
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert {roles[name] for name in trained} <= {"adapter"}
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    train(model, optimizer)
    assert set(optimizer.state) == set(trained.values())
    for param in trained.values():
        assert optimizer.state[param]["exp_avg"].shape == param.shape
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved
    assert moved <= set(trained)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "IA3", "VeRA"])
def test_the_base_keeps_its_roles(kind):
    wanted = roles_of(AdaPM(tiny_llama().parameters()))
    roles = roles_of(AdaPM(peft.get_peft_model(tiny_llama(), ADAPTERS[kind]()).parameters()))
    base = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): role
        for name, role in roles.items()
        if role != "adapter"
    }
    assert base == wanted


def test_a_head_trained_beside_adapters_is_a_head():
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, modules_to_save=["lm_head"], **TARGETS))
    optimizer = AdaPM(model.parameters(), rank=2, momentum="compact")
    (name,) = (name for name, param in model.named_parameters() if param.requires_grad and "lm_head" in name)
    assert roles_of(optimizer)[name] == "lm_head"
    train(model, optimizer)
    assert optimizer.state[dict(model.named_parameters())[name]]["exp_avg_l"].shape == (48, 2)
