"""Attention as courses, books and papers write it: heads as modules, projections in a list, letters for names."""

import itertools

import pytest
import torch
from torch import nn

from lightning_adapm import AdaPM

WIDTH, HEADS = 32, 4
# rows and inputs of multi-head latent attention's projections, in DeepSeek-V2's letters
LATENT = {
    "DQ": (12, WIDTH), "UQ": (WIDTH, 12), "QR": (16, 12), "DKV": (8, WIDTH), "UK": (WIDTH, 8), "UV": (WIDTH, 8),
    "KR": (4, WIDTH), "O": (WIDTH, WIDTH),
}  # fmt: skip
ROLES = {
    "DQ": "query", "UQ": "query", "QR": "query", "DKV": "value", "UK": "key", "UV": "value", "KR": "key",
    "O": "attn_out",
}  # fmt: skip


class MultiHeadAttention(nn.Module):
    def __init__(self, shapes, heads="num_heads", **attributes):
        super().__init__()
        for name, (outputs, inputs) in shapes.items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))
        vars(self).update({heads: HEADS, **attributes})


def found(attention):
    """``{name: [(role, heads), ...]}`` of the matrices of an attention in two blocks, by modules."""
    blocks = nn.ModuleList(
        nn.ModuleDict({"sa": attention(), "ffwd": nn.Sequential(nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH))})
        for _ in range(2)
    )
    model = nn.ModuleDict({"wte": nn.Embedding(61, WIDTH), "blocks": blocks})
    optimizer = AdaPM(model.parameters(), second_moment="block")
    assert {optimizer.roles[layer.weight] for layer in blocks[1]["ffwd"]} == {"mlp"}
    named = blocks[1]["sa"].named_parameters()
    return {name.removesuffix(".weight"): [(p.role, p.heads) for p in optimizer.pieces[w]] for name, w in named}


def test_each_of_several_heads_is_a_module():
    """Karpathy's GPT: a head's query and key are one head, although the module around them counts more."""

    def attention():
        size = (WIDTH // HEADS, WIDTH)
        outer = MultiHeadAttention({"proj": (WIDTH, WIDTH)})
        outer.heads = nn.ModuleList(
            MultiHeadAttention({"key": size, "query": size, "value": size}) for _ in range(HEADS)
        )
        return outer

    rows = found(attention)
    assert rows["proj"] == [("attn_out", None)]
    assert rows["heads.3.query"] == [("query", 1)]
    assert rows["heads.0.key"] == [("key", 1)]


def test_a_list_of_four_projections():
    """The Annotated Transformer's, whose number of heads is ``h``."""

    def attention(count=4):
        outer = MultiHeadAttention({}, heads="h")
        outer.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))
        return nn.ModuleDict({"self_attn": outer})

    def pooling():
        """An MLP of four layers that weighs tokens."""
        widths = (WIDTH, 64, 32, 16, 2)
        layers = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        return nn.ModuleDict({"self_attn": nn.ModuleDict({"linears": layers})})

    rows = found(attention)
    roles = [rows[f"self_attn.linears.{place}"] for place in range(4)]
    assert roles == [[("query", HEADS)], [("key", HEADS)], [("value", None)], [("attn_out", None)]]
    for other in (lambda: attention(5), pooling):
        with pytest.raises(ValueError, match=r"is not known:\n  blocks.0.sa.self_attn.linears.0.weight"):
            found(other)


def test_a_height_is_no_number_of_heads():
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = 8
            self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    with pytest.raises(ValueError, match="unknown number of heads"):
        found(Grid)
    shapes = dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (WIDTH, WIDTH))
    assert found(lambda: MultiHeadAttention(shapes, heads="h"))["w_q"] == [("query", HEADS)]


@pytest.mark.parametrize("spelled", [str.lower, str.upper], ids=["W_dkv", "W_DKV"])
def test_latent_attention_in_its_papers_letters(spelled):
    rows = found(lambda: MultiHeadAttention({f"W_{spelled(name)}": shape for name, shape in LATENT.items()}))
    assert {name.removeprefix("W_").upper(): row[0][0] for name, row in rows.items()} == ROLES
    assert rows[spelled("W_uk").replace("w_", "W_")] == [("key", HEADS)]


@pytest.mark.parametrize(
    ("down", "up"), [("kv_down", "{}_up"), ("kv_proj_down", "{}_proj_up"), ("kv_compress", "{}_decompress")]
)
def test_latent_attention_in_words(down, up):
    shapes = {"q_proj": LATENT["O"], down: LATENT["DKV"], "k_rope": LATENT["KR"], "o_proj": LATENT["O"]}
    shapes |= {up.format("k"): LATENT["UK"], up.format("v"): LATENT["UV"]}
    rows = found(lambda: MultiHeadAttention(shapes))
    assert rows[down] == [("value", None)]
    assert rows[up.format("k")] == [("key", HEADS)]
    assert rows["k_rope"] == [("key", 1)]


def test_latent_attention_with_fused_keys_and_values():
    """Megatron's names: heads hold their key's rows, then their value's, where head sizes are known."""
    shapes = {
        "linear_q_proj": LATENT["O"], "linear_kv_down_proj": (12, WIDTH), "linear_kv_up_proj": (HEADS * 14, 8),
        "linear_proj": (WIDTH, HEADS * 6),
    }  # fmt: skip
    rows = found(lambda: MultiHeadAttention(shapes, qk_head_dim=8, v_head_dim=6))
    assert rows["linear_kv_up_proj"] == [("key", HEADS), ("value", None)]
    assert rows["linear_proj"] == [("attn_out", None)]
    with pytest.raises(ValueError, match=r"linear_kv_up_proj.weight .*which rows are whose is not known"):
        found(lambda: MultiHeadAttention(shapes))


def test_a_model_of_a_course_trains():
    blocks = nn.ModuleList(MultiHeadAttention({f"W_{name}": shape for name, shape in LATENT.items()}) for _ in range(2))
    optimizer = AdaPM(blocks.parameters(), momentum="compact", second_moment="block")
    before = [param.detach().clone() for param in blocks.parameters()]
    for _ in range(2):
        for param in blocks.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, blocks.parameters(), strict=True))
