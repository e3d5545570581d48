"""Roles and rows of real architectures, on the meta device: nothing is downloaded and no memory is used."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from litgpt.adapter import GPT as AdapterGPT  # noqa: N811
from litgpt.adapter import Config as AdapterConfig
from litgpt.lora import GPT as LoRAGPT  # noqa: N811
from litgpt.lora import Config as LoRAConfig
from models import litgpt_families, litgpt_on_meta
from torch import nn

from lightning_adapm import AdaPM


def optimizer_of(model, **options):
    return AdaPM(model.parameters(), **options)


def roles_of(model, **options):
    optimizer = optimizer_of(model, **options)
    return {n: r for g in optimizer.param_groups for n, r in zip(g["param_names"], g["roles"], strict=True)}


def rows_of(optimizer, param):
    return [(p.role, p.start, p.stop, p.groups, p.heads) for p in optimizer.pieces[param]]


@pytest.mark.parametrize("name", litgpt_families())
def test_every_litgpt_family(name):
    model = litgpt_on_meta(name)
    optimizer = optimizer_of(model, second_moment="block")
    config, roles = model.config, roles_of(model)
    assert roles["transformer.wte.weight"] == "embedding"
    assert roles["lm_head.weight"] == "lm_head"
    assert roles["transformer.h.0.attn.proj.weight"] == "attn_out"
    assert {role for n, role in roles.items() if "norm" in n or "ln_f" in n} <= {"norm", "bias"}
    assert {role for n, role in roles.items() if ".mlp." in n and n.endswith("weight")} == {"mlp"}
    assert {n.rpartition(".")[2] for n, role in roles.items() if role == "bias"} <= {"bias"}
    if hasattr(model.transformer.h[0].attn, "qkv"):
        q, kv = config.n_head * config.head_size, config.n_query_groups * config.head_size
        assert rows_of(optimizer, model.transformer.h[0].attn.qkv.weight) == [
            ("query", 0, q, 1, config.n_head),
            ("key", q, q + kv, 1, config.n_query_groups),
            ("value", q + kv, q + 2 * kv, 1, None),
        ]


LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6
}  # fmt: skip


def test_multi_head_latent_attention():
    config = Config(
        n_layer=1, n_embd=32, n_head=4, padded_vocab_size=64, block_size=16, bias=False, attn_bias=False,
        norm_class_name="RMSNorm", latent_attention=LATENT,
    )  # fmt: skip
    with torch.device("meta"):
        model = GPT(config)
    optimizer, attn = optimizer_of(model, second_moment="block"), model.transformer.h[0].attn
    assert rows_of(optimizer, attn.q_a_proj.weight)[0][0] == "query"
    assert rows_of(optimizer, attn.q_b_proj.weight)[0][0] == "query"
    assert rows_of(optimizer, attn.kv_a_proj_with_mqa.weight) == [("value", 0, 16, 1, None), ("key", 16, 20, 1, 1)]
    assert rows_of(optimizer, attn.kv_b_proj.weight) == [("key", 0, 8, 4, 4), ("value", 8, 14, 4, None)]


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_adapters_keep_full_momentum_and_a_frozen_base_costs_nothing(kind):
    fields = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "padded_vocab_size": 64, "block_size": 16}
    if kind == "lora":
        targets = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp", "head")}
        model = LoRAGPT(LoRAConfig(**fields, lora_r=2, lora_alpha=4, **targets))
        trained = lambda name: "lora_" in name  # noqa: E731
    else:
        model = AdapterGPT(AdapterConfig(**fields, adapter_start_layer=0))
        trained = lambda name: "adapter_wte" in name or "gating_factor" in name  # noqa: E731
    for name, param in model.named_parameters():
        param.requires_grad_(trained(name))
    optimizer = optimizer_of(model)
    F.cross_entropy(model(torch.arange(12)[None]).flatten(0, 1), torch.arange(12)).backward()
    optimizer.step()
    held = {n for n, p in model.named_parameters() if optimizer.state.get(p)}
    assert held == {n for n, _ in model.named_parameters() if trained(n)}
    assert all("exp_avg" in state for state in optimizer.state.values())
    assert roles_of(model)["transformer.h.0.attn.proj.linear.weight" if kind == "lora" else "lm_head.weight"] in (
        "attn_out", "lm_head"
    )  # fmt: skip


def test_multihead_attention_and_encoder_layer():
    with torch.device("meta"):
        model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64), 2)
        apart = nn.MultiheadAttention(32, 4, kdim=16, vdim=8)
    roles = {re.sub(r"^layers\.\d\.", "", n): r for n, r in roles_of(model).items()}
    assert roles["self_attn.in_proj_weight"] == "qkv"
    assert roles["self_attn.out_proj.weight"] == "attn_out"
    assert roles["linear1.weight"] == roles["linear2.weight"] == "mlp"
    optimizer = optimizer_of(model, second_moment="block")
    assert rows_of(optimizer, model.layers[0].self_attn.in_proj_weight) == [
        ("query", 0, 32, 1, 4), ("key", 32, 64, 1, 4), ("value", 64, 96, 1, None)
    ]  # fmt: skip
    assert [roles_of(apart)[f"{x}_proj_weight"] for x in "qkv"] == ["query", "key", "value"]


class ViTBlock(nn.Module):
    """As timm's."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.Module()
        self.attn.num_heads = num_heads
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 32)), nn.Parameter(torch.zeros(1, 17, 32))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.ModuleList(ViTBlock(32, 4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)


def test_vision_transformer():
    with torch.device("meta"):
        model = ViT()
    roles = roles_of(model, second_moment="block")
    assert roles["cls_token"] == "norm"
    assert roles["pos_embed"] == "embedding"
    assert roles["patch_embed.proj.weight"] == "mlp"
    assert roles["blocks.1.attn.qkv.weight"] == "qkv"
    assert roles["blocks.1.attn.proj.weight"] == "attn_out"
    assert roles["blocks.1.mlp.fc1.weight"] == "mlp"
    assert roles["head.weight"] == "lm_head"


class NanoGPTAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_head, self.n_embd = 4, 32
        self.c_attn, self.c_proj = nn.Linear(32, 96), nn.Linear(32, 32)


def test_nanogpt():
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"attn": NanoGPTAttention()}) for _ in range(2))})
    optimizer = optimizer_of(model, second_moment="block")
    assert rows_of(optimizer, model["h"][0]["attn"].c_attn.weight)[1] == ("key", 32, 64, 1, 4)


@pytest.mark.parametrize("optimizer_options", [{"unmatched": "low_rank"}, {"unmatched": "full"}])
@pytest.mark.filterwarnings("ignore:unmatched=")
def test_convolutions_and_recurrent_networks_train(optimizer_options):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 4))
    conv = conv.to(memory_format=torch.channels_last)
    lstm = nn.LSTM(8, 24, batch_first=True)
    images, sequence = torch.randn(16, 3, 8, 8), torch.randn(4, 9, 8)
    for model, loss_of in (
        (conv, lambda: F.cross_entropy(conv(images), torch.arange(16) % 4)),
        (lstm, lambda: (lstm(sequence)[0][..., :8] - sequence.roll(1, 1)).square().mean()),
    ):
        with pytest.raises(ValueError, match="is not known"):
            optimizer_of(model)
        for second_moment in ("elementwise", "block", "factored"):
            net_losses = []
            twin = copy.deepcopy(model.state_dict())
            optimizer = optimizer_of(model, lr=1e-2, second_moment=second_moment, **optimizer_options)
            for _ in range(30):
                optimizer.zero_grad()
                loss = loss_of()
                loss.backward()
                optimizer.step()
                net_losses.append(loss.item())
            assert net_losses[-1] < 0.8 * net_losses[0]
            model.load_state_dict(twin)
    weight = conv[2].weight
    optimizer = optimizer_of(conv, rank=2, unmatched="low_rank")
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg_r"].shape == (2, 16 * 9)
