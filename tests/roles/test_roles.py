"""Names that mislead: a role that is wrong in silence is worse than an error."""

import copy

import pytest
import torch
from torch import nn

from lightning_adapm import AdaPM

QKVO = {name: nn.Linear(16, 16) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


def tree(**children):
    """A module of linear layers and modules, by name."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def model_of(**block):
    """Two equal blocks between an embedding and a head."""
    layers = nn.ModuleList(copy.deepcopy(tree(**block)) for _ in range(2))
    return tree(emb=nn.Embedding(20, 16), layers=layers, head=nn.Linear(16, 20))


def linear(**sizes):
    return {name: nn.Linear(*size) for name, size in sizes.items()}


def role_of(model, name):
    optimizer = AdaPM(model.parameters())
    roles = {n: r for g in optimizer.param_groups for n, r in zip(g["param_names"], g["roles"], strict=True)}
    return roles[f"layers.1.{name}.weight"]


def refused(model):
    with pytest.raises(ValueError, match="is not known") as error:
        AdaPM(model.parameters())
    return str(error.value)


SQUARE = (16, 16)


@pytest.mark.parametrize(
    "names",
    [
        "q_proj k_proj v_proj o_proj",
        "q k v o",
        "wq wk wv wo",
        "Wq Wk Wv Wo",
        "W_query W_key W_value out_proj",
        "query key value proj",
        "query key value dense",
        "queries keys values out",
        "to_q to_k to_v to_out",
        "fc_q fc_k fc_v fc_o",
        "linear_q linear_k linear_v linear_out",
        "q_lin k_lin v_lin out_lin",
        "q_linear k_linear v_linear out",
        "project_q project_k project_v attention_out",
        "query_proj key_proj value_proj output_proj",
        "WQ WK WV linear",
        "c_q c_k c_v c_proj",
        "w_qs w_ks w_vs fc",
        "lin_q lin_k lin_v lin_o",
        "q_layer k_layer v_layer o_layer",
        "toqueries tokeys tovalues unifyheads",
        "query_projection key_projection value_projection out_projection",
        "w_q w_k w_v w_concat",
        "attn_q attn_k attn_v attn_output",
        "self_query self_key self_value self_out",
        "qw kw vw ow",
        "query_dense key_dense value_dense out_dense",
        "dense_q dense_k dense_v dense_out",
        "q_map k_map v_map o_map",
        "mha_q mha_k mha_v mha_o",
        "q_proj k_proj v_proj final_proj",
        "wq wk wv resid_proj",
    ],
)
def test_ways_to_call_the_projections(names):
    model = model_of(att=tree(**{name: nn.Linear(16, 16) for name in names.split()}), ff=nn.Linear(16, 16))
    found = [role_of(model, f"att.{name}") for name in names.split()]
    assert found == ["query", "key", "value", "attn_out"]
    assert role_of(model, "ff") == "mlp"


@pytest.mark.parametrize(
    "name", ["c_qkv", "fc_qkv", "proj_qkv", "fused_qkv", "qkv_layer", "qkv_projection", "qkv_fused"]
)
def test_ways_to_call_a_fused_projection(name):
    model = model_of(att=tree(**{name: nn.Linear(16, 48), "out": nn.Linear(16, 16)}))
    weight = getattr(model.layers[1].att, name).weight
    pieces = AdaPM(model.parameters()).pieces[weight]
    assert [(piece.role, piece.start) for piece in pieces] == [("query", 0), ("key", 16), ("value", 32)]


@pytest.mark.parametrize("name", ["linear_qkv", "kqv"])
def test_fused_projections_of_another_order_are_refused(name):
    """Megatron's linear_qkv is interleaved by head."""
    model = model_of(att=tree(**{name: nn.Linear(16, 48), "out": nn.Linear(16, 16)}), attn=tree(**QKVO))
    assert f"layers.1.att.{name}.weight" in refused(model)


def test_a_fused_convolution_has_the_rows_of_a_fused_layer():
    """As in the attention of diffusion models."""
    attention = tree(norm=nn.GroupNorm(4, 16), qkv=nn.Conv1d(16, 48, 1), proj_out=nn.Conv1d(16, 16, 1))
    model, weight = model_of(attn=attention), None
    optimizer = AdaPM(model.parameters())
    weight = model.layers[1].attn.qkv.weight
    pieces = optimizer.pieces[weight]
    assert [piece.role for piece in pieces] == ["query", "key", "value"]
    for index, piece in enumerate(pieces):
        assert torch.equal(piece.matrix(weight), weight[16 * index : 16 * (index + 1), :, 0])


@pytest.mark.parametrize("name", ["fc_kv", "lin_kv", "proj_kv", "kv_layer", "kv_net"])
def test_ways_to_call_fused_keys_and_values(name):
    model = model_of(att=tree(q=nn.Linear(16, 16), **{name: nn.Linear(16, 32), "out": nn.Linear(16, 16)}))
    weight = getattr(model.layers[1].att, name).weight
    assert [piece.role for piece in AdaPM(model.parameters()).pieces[weight]] == ["key", "value"]


@pytest.mark.parametrize("child", ["wo", "out_proj", "o_proj", "proj", "c_proj", "dense", "fc", "w1", "output", "out"])
def test_outputs_of_an_mlp_are_no_attention_outputs(child):
    model = model_of(attn=tree(**QKVO), glu=tree(**linear(wi=(16, 32), **{child: (32, 16)})))
    assert role_of(model, f"glu.{child}") == "mlp"
    assert role_of(model, "attn.o_proj") == "attn_out"


@pytest.mark.parametrize("child", ["merge", "resid_proj", "final_proj"])
def test_names_of_outputs_next_to_an_output_are_refused(child):
    """A layer that merges two streams is no output of the attention next to it."""
    model = model_of(attn=tree(**QKVO, **linear(**{child: (16, 32)})))
    assert f"2 matrices is not known:\n  layers.0.attn.{child}.weight" in refused(model)


@pytest.mark.parametrize("kind", ["MultiHeadAttention", "Mix"])
def test_heads_as_modules_with_one_output_around_them(kind):
    def mixing():
        module = type(kind, (nn.Module,), {})()
        module.heads = nn.ModuleList(tree(**linear(key=(16, 4), query=(16, 4), value=(16, 4))) for _ in range(4))
        module.proj = nn.Linear(16, 16)
        return module

    model = model_of(sa=mixing(), ffwd=tree(net=nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16))))
    assert role_of(model, "sa.proj") == "attn_out"
    assert role_of(model, "sa.heads.2.value") == "value"
    assert role_of(model, "ffwd.net.1") == "mlp"
    blocks = AdaPM(model.parameters()).blocks
    assert blocks[model.layers[1].sa.heads[2].value.weight] == "layers.1"


def test_heads_and_an_mlp_in_one_block():
    heads = nn.ModuleList(tree(**linear(key=(16, 4), query=(16, 4), value=(16, 4))) for _ in range(4))
    model = model_of(heads=heads, **linear(proj=(16, 16), fc=(16, 64), fc2=(64, 16)))
    assert [role_of(model, name) for name in ("proj", "fc", "fc2")] == ["attn_out", "mlp", "mlp"]


def test_an_mlp_next_to_the_projections_in_one_module():
    model = model_of(**linear(q=SQUARE, k=SQUARE, v=SQUARE, o=SQUARE, up=(16, 32), down=(32, 16), fc=(16, 32)))
    assert [role_of(model, name) for name in ("o", "up", "down", "fc")] == ["attn_out", "mlp", "mlp", "mlp"]


def test_biases_and_bags_are_no_matrices_of_an_mlp_and_no_heads():
    model = model_of(attn=tree(**QKVO))
    for layer in model.layers:
        layer.mlp = nn.ParameterDict({"bias1": torch.zeros(4, 16), "b_in": torch.zeros(4, 16)})
    model.bag = nn.EmbeddingBag(20, 16)
    optimizer = AdaPM(model.parameters())
    assert {optimizer.roles[param] for param in model.layers[0].mlp.values()} == {"bias"}
    assert optimizer.roles[model.bag.weight] == "embedding"


def test_an_attention_of_unknown_names_is_refused_beside_a_known_one():
    class MultiHeadAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

    message = refused(model_of(attn=tree(**QKVO), across=MultiHeadAttention()))
    assert "layers.0.across.one.weight" in message
    assert "q_proj" not in message


@pytest.mark.parametrize("name", ["mamba", "mixer", "ssm", "linear_attn", "time_mixing", "retention"])
def test_mixers_are_refused_even_in_a_block_with_attention(name):
    mixer = tree(**linear(in_proj=(16, 64), x_proj=(32, 8), out_proj=(32, 16)))
    message = refused(model_of(attn=tree(**QKVO), **{name: mixer}, mlp=nn.Linear(16, 16)))
    assert f"layers.1.{name}.in_proj.weight" in message
    assert "mlp" not in message.partition("State")[0]


def test_an_attention_that_is_called_mixer():
    """As in flash-attn's GPT; a matrix of another name in it is refused."""

    class MHA(nn.Module):
        def __init__(self, out="out_proj"):
            super().__init__()
            self.num_heads, self.Wqkv = 4, nn.Linear(16, 48)
            self.add_module(out, nn.Linear(16, 16))

    model = model_of(mixer=MHA(), mlp=nn.Linear(16, 16))
    assert role_of(model, "mixer.out_proj") == "attn_out"
    assert role_of(model, "mixer.Wqkv") == "qkv"
    assert "mixer.mystery.weight" in refused(model_of(mixer=MHA("mystery")))


def test_a_stack_of_queries_keys_and_values_is_refused_with_a_role_that_works():
    """As in modded-nanogpt."""
    attention = tree(c_proj=nn.Linear(16, 16))
    attention.num_heads, attention.qkv = 4, nn.Parameter(torch.zeros(3, 16, 16))
    model = model_of(attn=attention)
    with pytest.raises(ValueError, match=r"stack.*roles={'qkv': 'value'}"):
        AdaPM(model.parameters())
    pieces = AdaPM(model.parameters(), roles={"qkv": "value"}).pieces[model.layers[0].attn.qkv]
    assert [(piece.role, piece.flat) for piece in pieces] == [("value", False)]


def test_recurrent_layers_are_refused_by_their_type():
    message = refused(model_of(attn=tree(**QKVO), memory=nn.LSTM(16, 16)))
    assert "layers.0.memory.weight_ih_l0" in message


def test_norms_of_two_dimensions_over_heads():
    model = model_of(attn=tree(**QKVO, q_norm=nn.LayerNorm((4, 4))))
    assert role_of(model, "attn.q_norm") == "norm"


def test_a_gate_inside_attention_is_not_guessed():
    assert "attn.gate.weight" in refused(model_of(attn=tree(**QKVO, gate=nn.Linear(16, 16))))


def test_convolutions_are_linear_layers_where_they_are_one():
    model = model_of(attn=tree(**QKVO))
    model.patches = nn.Conv2d(3, 16, 4, stride=4)
    model.pointwise = nn.Conv1d(16, 16, 1)
    AdaPM(model.parameters())
    model.stem = tree(conv=nn.Conv2d(3, 16, 7, stride=2, padding=3))
    assert "stem.conv.weight" in refused(model)


def test_bare_parameters():
    model = model_of(attn=tree(**QKVO))
    model.query_tokens = nn.Parameter(torch.zeros(1, 8, 16))
    model.relative_position_bias_table = nn.Parameter(torch.zeros(49, 4))
    optimizer = AdaPM(model.parameters())
    assert optimizer.pieces[model.query_tokens][0].role == "embedding"
    assert optimizer.pieces[model.relative_position_bias_table][0].role == "bias"
    model.gadget = nn.Parameter(torch.zeros(5, 5))
    assert "gadget" in refused(model)


def test_a_fused_weight_whose_values_are_wider_is_refused_where_heads_are_known():
    attention = tree(qkv=nn.Linear(16, 64), proj=nn.Linear(32, 16))  # LeViT: 16 + 16 + 32 rows
    attention.num_heads = 4
    with pytest.raises(ValueError, match="which rows are whose"):
        AdaPM(model_of(attn=attention).parameters())


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ({"in_proj": (16, 112), "attn_out_proj": SQUARE, "mlp_out_proj": (64, 16)}, "in_proj attn_out_proj"),  # timm
        ({"fused_attn_ff_proj": (16, 96), "attn_out": SQUARE}, "fused_attn_ff_proj attn_out"),  # PaLM
        ({"to_qkv_mlp_proj": (16, 112), "to_out": (80, 16)}, "to_qkv_mlp_proj to_out"),
        ({"linear1": (16, 112), "linear2": (80, 16)}, "linear1 linear2"),  # Flux
    ],
)
def test_attention_fused_with_an_mlp_is_refused(block, names):
    model = model_of(self_attn=tree(**QKVO))
    model.single_blocks = nn.ModuleList([tree(**linear(**block))])
    for name in names.split():
        assert f"single_blocks.0.{name}.weight" in refused(model)


@pytest.mark.parametrize("hidden", [64, 128])
def test_the_two_layers_of_an_mlp_fit_gated_or_not(hidden):
    model = model_of(self_attn=tree(**QKVO), **linear(linear1=(16, hidden), linear2=(64, 16)))
    assert role_of(model, "linear1") == role_of(model, "linear2") == "mlp"


@pytest.mark.parametrize("parameter", ["A_log", "dt_bias"])
def test_mixers_of_unknown_names_are_refused_by_their_parameters(parameter):
    mixer = tree(**linear(in_proj=(16, 64), out_proj=(32, 16)))
    setattr(mixer, parameter, nn.Parameter(torch.zeros(8)))
    message = refused(model_of(self_attn=tree(**QKVO), token=mixer))
    assert "token.in_proj.weight" in message and "token.out_proj.weight" in message


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("output_projection", "lm_head"),  # fairseq
        ("transformer.ff_out", "lm_head"),  # OLMo
        ("lm_head.out_proj", "lm_head"),  # T5Gemma
        ("classifier.out_proj", "lm_head"),  # RoBERTa
        ("cls.seq_relationship", "lm_head"),  # BERT
        ("distillation_classifier", "lm_head"),  # DeiT
        ("mlp_head", "lm_head"),
        ("to_logits.1", "lm_head"),
        ("head.fc", "lm_head"),  # timm
        ("heads.1", "lm_head"),
        ("to_vocab", "lm_head"),
        ("pre_classifier", "mlp"),  # DistilBERT
        ("classifier.dense", "mlp"),  # RoBERTa
        ("predictions.transform.dense", "mlp"),  # BERT
    ],
)
def test_heads_and_what_lies_before_them(path, role):
    model = model_of(self_attn=tree(**QKVO))
    size = SQUARE if role == "mlp" else (16, 20) if path == "output_projection" else (16, 5)  # its shape tells that one
    *parents, child = path.split(".")
    module = nn.Linear(*size)
    for name in reversed([*parents, child]):
        module = tree(**{name: module})
    model.add_module((parents or [child])[0], next(module.children()))
    optimizer = AdaPM(model.parameters())
    roles = {n: r for g in optimizer.param_groups for n, r in zip(g["param_names"], g["roles"], strict=True)}
    assert roles[f"{path}.weight"] == role


@pytest.mark.parametrize("positions", [16, 12])
def test_a_table_of_positions_tells_no_head(positions):
    """MobileBERT's is square, as a layer before the head is; Chinese-CLIP's has as many rows as its projections."""
    model = model_of(self_attn=tree(**QKVO))
    model.positions, model.transform = nn.Embedding(positions, 16), nn.Linear(16, positions)
    optimizer = AdaPM(model.parameters())
    roles = {n: r for g in optimizer.param_groups for n, r in zip(g["param_names"], g["roles"], strict=True)}
    assert roles["transform.weight"] == "mlp" and roles["head.weight"] == "lm_head"


def attention_of_class(name, child="query_key_value"):
    """A module of a class of this name with a fused projection of four heads."""
    module = type(name, (nn.Module,), {})()
    module.add_module(child, nn.Linear(16, 48))
    module.dense, module.num_heads = nn.Linear(16, 16), 4
    return module


@pytest.mark.parametrize(
    ("kind", "child", "taught", "groups"),
    [
        ("GPTNeoXAttention", "query_key_value", None, 4),
        ("GPTNeoXAttention", "query_key_value", "qkv", 4),
        ("GLMAttention", "query_key_value", None, 1),
        ("Attention", "query_key_value", "qkv", 1),
        ("Attention", "query_key_value", "qkv_interleaved", 4),
        ("Attention", "linear_qkv", "qkv_interleaved", 4),
        ("Attention", "qkv", None, 1),
    ],
)
def test_the_order_of_rows_that_a_name_does_not_show_is_the_classes_or_the_callers(kind, child, taught, groups):
    model = model_of(attention=attention_of_class(kind, child))
    weight = getattr(model.layers[1].attention, child).weight
    optimizer = AdaPM(model.parameters(), roles={child: taught} if taught else None)
    assert {piece.groups for piece in optimizer.pieces[weight]} == {groups}
    again = AdaPM(optimizer.param_groups)  # whose roles say so, too
    assert again.pieces[weight] == optimizer.pieces[weight]


def test_rows_of_either_order_are_taken_for_those_of_heads_with_a_warning():
    model = model_of(attention=attention_of_class("Attention"))
    with pytest.warns(
        UserWarning, match=r"query_key_value of Attention is .* Write roles=\{'query_key_value': 'qkv'\} if all"
    ):
        optimizer = AdaPM(model.parameters())
    assert {piece.groups for piece in optimizer.pieces[model.layers[1].attention.query_key_value.weight]} == {4}
