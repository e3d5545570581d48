"""Models that nobody wrote with AdaPM in mind: reparametrized weights, lazy layers, packed bases, other names."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from models import PlainLM, token_batches
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from lightning_adapm import AdaPM
from lightning_adapm.report.explain import explain
from lightning_adapm.roles.fused import find_heads

WIDTH, HEADS = 32, 4


def rows_of(model, **options):
    """``{name without what a reparametrization adds: [(role, heads, start, stop), ...]}`` of every matrix."""
    optimizer = AdaPM(model.parameters(), **options)
    by_names = AdaPM(list(model.named_parameters()), **options | {"second_moment": "elementwise"})
    rows = {}
    for name, param in model.named_parameters():
        if sum(size > 1 for size in param.shape) > 1:
            assert [p.role for p in by_names.pieces[param]] == [p.role for p in optimizer.pieces[param]]
            rows[name] = [(p.role, p.heads, p.start, p.stop) for p in optimizer.pieces[param]]
    return rows


def reparametrized(model, how):
    for module in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        how(module)
    return model


def pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.l1_unstructured(layer, "bias", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(
    ("how", "matrix"),
    [
        (parametrizations.weight_norm, "parametrizations.weight.original1"),
        (parametrizations.spectral_norm, "parametrizations.weight.original"),
        (parametrizations.orthogonal, "parametrizations.weight.original"),
        (old_weight_norm, "weight_v"),
        (old_spectral_norm, "weight_orig"),
        (pruned, "weight_orig"),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm", "pruned"],
)
def test_reparametrized_weights_keep_their_roles_and_heads(how, matrix):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = PlainLM(layers=1)
            self.plain.lm_head = nn.Linear(WIDTH, 61)
            self.blocks = nn.ModuleList([timm_block()])

    wanted = rows_of(Fused(), second_moment="block")
    found = rows_of(reparametrized(Fused(), how), second_moment="block")
    assert {name.replace(matrix, "weight"): rows for name, rows in found.items()} == wanted


def test_a_reparametrized_model_trains_with_low_rank_momentum():
    model = reparametrized(PlainLM(layers=1), parametrizations.weight_norm)
    optimizer = AdaPM(model.parameters(), rank=2, momentum="compact", state_dtype=None)
    model(token_batches(1)[0]).backward()
    optimizer.step()
    query = model.layers[0].self_attn.q_proj.parametrizations.weight
    assert "exp_avg_l" in optimizer.state[query.original1]
    assert "exp_avg" in optimizer.state[query.original0]


def test_roles_are_taught_by_the_plain_name_or_the_reparametrized_one():
    for pattern in (r"q_proj\.weight$", r"q_proj\.parametrizations\."):
        rows = rows_of(reparametrized(PlainLM(layers=1), parametrizations.weight_norm), roles={pattern: "value"})
        assert rows["layers.0.self_attn.q_proj.parametrizations.weight.original1"][0][0] == "value"


def timm_block(width=WIDTH, heads="num_heads"):
    block = nn.Module()
    block.attn, block.mlp = nn.Module(), nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, width))
    setattr(block.attn, heads, HEADS)
    block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
    return block


def test_a_lazy_layer_is_refused_by_name():
    model = PlainLM(layers=1)
    model.extra = nn.LazyLinear(4)
    with pytest.raises(ValueError, match=r"extra\.weight has no shape yet.*Run the model on one batch before"):
        AdaPM(model.parameters())
    model.extra(torch.ones(1, WIDTH))
    AdaPM(model.parameters())


class Packed(nn.Module):
    """A linear layer of 4-bit numbers, two in a byte, as bitsandbytes (one column) or HQQ (a matrix) hold them."""

    def __init__(self, inputs, outputs, columns):
        super().__init__()
        packed = torch.zeros(inputs * outputs // 2 // columns, columns, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize("columns", [1, 24])
@pytest.mark.parametrize("second_moment", ["elementwise", "block"])
def test_a_packed_base_costs_nothing_and_says_nothing_about_its_neighbors(columns, second_moment):
    model = PlainLM(layers=1, width=48, n_query_groups=4).requires_grad_(False)
    attention = model.layers[0].self_attn
    for name in ("q_proj", "v_proj", "o_proj"):
        base, layer = Packed(48, 48, columns), nn.Module()
        layer.base_layer, layer.lora_A, layer.lora_B = base, nn.Linear(48, 2), nn.Linear(2, 48)
        setattr(attention, name, layer)
    rows = rows_of(model, second_moment=second_moment)
    optimizer = AdaPM(model.parameters(), second_moment=second_moment)
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.requires_grad else None
    optimizer.step()
    assert set(optimizer.state) == {param for param in model.parameters() if param.requires_grad}
    assert all("lora" in name for name, param in model.named_parameters() if param in optimizer.state)
    assert rows["layers.0.self_attn.q_proj.lora_A.weight"][0][0] == "adapter"
    assert explain(model).parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_heads_of_a_trained_key_beside_a_packed_query_are_not_guessed():
    model = PlainLM(layers=1, n_query_groups=4)
    attention = model.layers[0].self_attn
    del attention.n_query_groups
    attention.q_proj = Packed(WIDTH, WIDTH, 32)
    optimizer = AdaPM(model.parameters())
    assert optimizer.pieces[attention.k_proj.weight][0].heads is None


def test_frozen_complex_tables_are_no_business_of_the_optimizer():
    model = PlainLM(layers=1)
    model.freqs = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64), requires_grad=False)
    AdaPM(model.parameters())


@pytest.mark.parametrize(
    "name", ["heads", "n_heads", "num_attention_heads", "nhead", "num_head", "nheads", "attention_heads", "n_head"]
)
def test_head_counts_under_other_usual_names(name):
    model = nn.Module()
    model.blocks = nn.ModuleList([timm_block(heads=name)])
    rows = rows_of(model, second_moment="block")
    assert [row[:2] for row in rows["blocks.0.attn.qkv.weight"]] == [("query", 4), ("key", 4), ("value", None)]


@pytest.mark.parametrize("holder", ["config", "cfg", "args", "hparams"])
@pytest.mark.parametrize("as_dict", [False, True])
def test_head_counts_of_a_configuration(holder, as_dict):
    config = {"heads": 4, "n_kv_heads": 2}
    module = nn.Module()
    setattr(module, holder, config if as_dict else type("Config", (), config)())
    heads = find_heads([nn.Linear(2, 2), module])
    assert (heads.n_head, heads.n_query_groups) == (4, 2)


@pytest.mark.parametrize("type_", ["random", "sincos"])
def test_positions_of_patchtst(type_):
    transformers = pytest.importorskip("transformers")
    config = transformers.PatchTSTConfig(
        d_model=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, positional_encoding_type=type_
    )
    rows = rows_of(transformers.PatchTSTForPretraining(config))
    assert rows["model.encoder.positional_encoder.position_enc"][0][0] == "embedding"


@pytest.mark.parametrize(
    ("name", "role"),
    [("W_pos", "embedding"), ("pe", "embedding"), ("pos_enc", "embedding"), ("time_pos", "embedding"),
     ("memory_tokens", "embedding"), ("soft_prompt", "embedding"), ("scale_shift_table", "bias"),
     ("modulation", "bias")],
)  # fmt: skip
@pytest.mark.parametrize("place", ["block", "model"])
def test_tables_that_are_no_layers_weight(name, role, place):
    model = PlainLM(layers=1)
    setattr(model if place == "model" else model.layers[0], name, nn.Parameter(torch.zeros(6, WIDTH)))
    assert rows_of(model)[name if place == "model" else f"layers.0.{name}"][0][0] == role


def test_a_matrix_that_its_block_multiplies_with_itself_is_no_table():
    model = PlainLM(layers=1)
    model.layers[0].W1 = nn.Parameter(torch.zeros(WIDTH, WIDTH))
    assert rows_of(model)["layers.0.W1"][0][0] == "mlp"


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_tables_of_shifts_train(second_moment):
    table = nn.Parameter(torch.ones(1, 6, WIDTH))
    optimizer = AdaPM([("blocks.0.modulation", table)], second_moment=second_moment)
    table.grad = torch.ones_like(table)
    optimizer.step()
    assert optimizer.state[table]["exp_avg"].shape == table.shape
    assert (table < 1).all()


def linears(**sizes):
    module = nn.Module()
    for name, (inputs, outputs) in sizes.items():
        setattr(module, name, nn.Linear(inputs, outputs))
    return module


def test_a_diffusion_transformer_whose_block_holds_its_attention():
    """The block of masked diffusion language models (DiT with ``attn_qkv`` and ``attn_out`` in the block itself)."""
    d, model = WIDTH, nn.Module()
    block = linears(attn_qkv=(d, 3 * d), attn_out=(d, d), adaLN_modulation=(8, 6 * d))
    block.n_heads, block.mlp = HEADS, nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
    model.vocab_embed = nn.Embedding(61, d)
    model.blocks, model.output_layer = nn.ModuleList([block]), linears(linear=(d, 61), adaLN_modulation=(8, 2 * d))
    rows = rows_of(model, second_moment="block")
    assert rows["blocks.0.attn_qkv.weight"] == [("query", 4, 0, d), ("key", 4, d, 2 * d), ("value", None, 2 * d, 3 * d)]
    assert rows["blocks.0.attn_out.weight"][0][0] == "attn_out"
    assert rows["blocks.0.adaLN_modulation.weight"][0][0] == "mlp"
    assert rows["output_layer.adaLN_modulation.weight"][0][0] == "mlp"
    assert rows["output_layer.linear.weight"][0][0] == "lm_head"


def test_a_diffusion_transformer_of_two_streams():
    """Names of the blocks of Stable Diffusion 3 (joint attention), of Hunyuan's and of Flux' modulation."""
    d, model = WIDTH, nn.Module()
    joint, hunyuan = nn.Module(), linears(img_attn_qkv=(d, 3 * d), img_attn_proj=(d, d))
    joint.attn = linears(to_q=(d, d), to_k=(d, d), to_v=(d, d), add_q_proj=(d, d), add_k_proj=(d, d),
                         add_v_proj=(d, d), to_add_out=(d, d))  # fmt: skip
    joint.attn.heads, hunyuan.heads_num, joint.attn.to_out = HEADS, HEADS, nn.ModuleList([nn.Linear(d, d)])
    joint.norm1, hunyuan.img_mod = linears(linear=(d, 6 * d)), linears(linear=(d, 6 * d))
    model.transformer_blocks, model.double_blocks = nn.ModuleList([joint]), nn.ModuleList([hunyuan])
    rows = {name: [row[0] for row in found] for name, found in rows_of(model).items()}
    attention = "transformer_blocks.0.attn."
    assert rows[attention + "add_q_proj.weight"] == ["query"]
    assert rows[attention + "add_k_proj.weight"] == ["key"]
    assert rows[attention + "add_v_proj.weight"] == ["value"]
    assert rows[attention + "to_add_out.weight"] == rows[attention + "to_out.0.weight"] == ["attn_out"]
    assert rows["double_blocks.0.img_attn_qkv.weight"] == ["query", "key", "value"]
    assert rows["double_blocks.0.img_attn_proj.weight"] == ["attn_out"]
    assert rows["double_blocks.0.img_mod.linear.weight"] == ["mlp"]


@pytest.mark.parametrize("pointwise", [nn.Linear, lambda i, o: nn.Conv2d(i, o, 1)], ids=["linear", "convolution"])
@pytest.mark.parametrize("names", [("dwconv", "pwconv1", "pwconv2"), ("spatial", "expand", "reduce")])
def test_pointwise_layers_of_convnext_like_blocks(pointwise, names):
    block, (depthwise, first, second) = nn.Module(), names
    setattr(block, depthwise, nn.Conv2d(8, 8, 7, padding=3, groups=8))
    setattr(block, first, pointwise(8, 32))
    setattr(block, second, pointwise(32, 8))
    model = nn.Module()
    model.stages = nn.ModuleList([block])
    optimizer = AdaPM(model.parameters(), roles={depthwise: "full"})
    assert {optimizer.pieces[getattr(block, name).weight][0].role for name in (first, second)} == {"mlp"}


def test_the_line_to_paste_saves_memory_where_it_can_guess():
    model = nn.Module()
    model.stem, model.body, model.rnn = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.LSTM(8, 8)
    model.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8))
    model.query, model.table = nn.Linear(8, 8), nn.Parameter(torch.zeros(5, 8))
    with pytest.raises(ValueError, match="the role of 7 matrices is not known") as refused:
        AdaPM(model.parameters())
    message, full = str(refused.value), 4 * (8 * 27 + 64 + 72 + 2 * 32 * 8 + 64 + 40)
    assert f"full momentum, {full:,} bytes" in message
    line = next(line for line in message.splitlines() if line.startswith("  roles={"))
    roles = eval(line.removeprefix("  roles="))
    assert {key.strip("^$").replace("\\", ""): role for key, role in roles.items()} == {
        "stem.weight": "low_rank", "body.weight": "mlp", "depthwise.d+.weight": "full", "query.weight": "query",
        "table": "full", "rnn.weight_ih_ld+": "full", "rnn.weight_hh_ld+": "full",
    }  # fmt: skip
    optimizer = AdaPM(model.parameters(), roles=roles, rank=1, momentum="compact")
    assert {"exp_avg_l"} <= {key for param in (model.stem.weight, model.body.weight, model.query.weight)
                             for part in optimizer.parts(param) for key in part.entries}  # fmt: skip
    assert line.strip() in explain(model).advice
