"""A fused weight is exactly its parts: real modules trained beside the same modules with separate weights.

Which rows are whose is never taken from the package's tables: it is read from each module's own forward.
"""

import copy
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import litgpt
import pytest
import torch
import torch.nn.functional as F
from models import names_alone, relative_difference
from observed import Keep, observed_rows
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_adapm import AdaPM

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D

VOCAB, WIDTH = 48, 32


def causal(name, **fields):
    """A causal Hugging Face model; ``fields`` configure it."""

    def make():
        model_class = getattr(transformers, name)
        config = model_class.config_class(**{"vocab_size": VOCAB, "pad_token_id": 0} | fields)
        config._attn_implementation = "eager"
        return model_class(config)

    return make


def decoder(**fields):
    sizes = {"hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sizes | fields


class Attend(nn.Module):
    """Attention over a fused projection, as small models are written; ``layout`` says how its rows read."""

    def __init__(self, layout, n_head=4, n_query_groups=4):
        super().__init__()
        self.layout, self.n_head, self.n_query_groups, self.size = layout, n_head, n_query_groups, WIDTH // n_head
        rows = (n_head + 2 * n_query_groups) * self.size
        name = {"nanogpt": "c_attn", "timm": "qkv", "litgpt before 0.5.3": "attn"}[layout]
        out = "c_proj" if layout == "nanogpt" else "proj"
        self.fused, self.out = name, out
        self.add_module(name, nn.Linear(WIDTH, rows))
        self.add_module(out, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        b, t, _ = x.shape
        y = getattr(self, self.fused)(x)
        if self.layout == "nanogpt":
            q, k, v = (part.view(b, t, self.n_head, self.size) for part in y.split(WIDTH, dim=2))
        elif self.layout == "timm":
            q, k, v = y.reshape(b, t, 3, self.n_head, self.size).unbind(2)
        else:
            per_group = self.n_head // self.n_query_groups
            y = y.view(b, t, self.n_query_groups, per_group + 2, self.size)
            q, k, v = y.split((per_group, 1, 1), dim=3)
            q = q.reshape(b, t, -1, self.size)
            k, v = (part.expand(-1, -1, -1, per_group, -1).reshape(b, t, -1, self.size) for part in (k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = (q @ k.mT / self.size**0.5).softmax(-1) @ v
        return getattr(self, self.out)(y.transpose(1, 2).flatten(2))


class Small(nn.Module):
    def __init__(self, layout, **heads):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.h = nn.ModuleList(nn.ModuleDict({"attn": Attend(layout, **heads)}) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens):
        x = self.wte(tokens)
        for block in self.h:
            x = x + block["attn"](x)
        return self.head(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.MultiheadAttention(WIDTH, 4, batch_first=True) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens):
        x = self.wte(tokens)
        for layer in self.layers:
            x = x + layer(x, x, x)[0]
        return self.head(x)


class CrossAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = causal("GPT2LMHeadModel", add_cross_attention=True, **GPT2)()

    def forward(self, tokens):
        return self.model(tokens, encoder_hidden_states=self.model.transformer.wte(tokens))


def litgpt_model():
    fields = {"n_layer": 2, "n_head": 4, "n_query_groups": 2, "n_embd": WIDTH, "head_size": 12, "block_size": 16}
    return litgpt.GPT(litgpt.Config(**fields, padded_vocab_size=VOCAB))


FALCON = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 16}
LATENT = decoder(
    num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
    first_k_dense_replace=2, moe_intermediate_size=16,
)  # fmt: skip

# name: how to make it, the fused weight's name, heads of queries and of keys
LAYOUTS = {
    "GPT-2": (causal("GPT2LMHeadModel", **GPT2), "c_attn", 4, 4),
    "GPT-2, across": (CrossAttention, "crossattention.c_attn", 4, 4),
    "GPT-NeoX": (causal("GPTNeoXForCausalLM", **decoder()), "query_key_value", 4, 4),
    "BLOOM": (causal("BloomForCausalLM", hidden_size=WIDTH, n_layer=2, n_head=4), "query_key_value", 4, 4),
    "Falcon, one key": (causal("FalconForCausalLM", multi_query=True, **FALCON), "query_key_value", 4, 1),
    "Falcon, old": (causal("FalconForCausalLM", multi_query=False, **FALCON), "query_key_value", 4, 4),
    "Falcon, new": (
        causal("FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2, **FALCON), "query_key_value", 4, 2
    ),
    "CodeGen": (
        causal("CodeGenForCausalLM", rotary_dim=4, n_ctx=16, **{**GPT2, "n_head": 8}), "qkv_proj", 8, 8
    ),
    "GPT-BigCode, one key": (causal("GPTBigCodeForCausalLM", multi_query=True, **GPT2), "c_attn", 4, 1),
    "GPT-BigCode": (causal("GPTBigCodeForCausalLM", multi_query=False, **GPT2), "c_attn", 4, 4),
    "MPT": (causal("MptForCausalLM", d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=16), "Wqkv", 4, 4),
    "Persimmon": (causal("PersimmonForCausalLM", **decoder()), "query_key_value", 4, 4),
    "Phi-3": (causal("Phi3ForCausalLM", **decoder(num_key_value_heads=2)), "qkv_proj", 4, 2),
    "DeBERTa": (
        causal("DebertaForMaskedLM", relative_attention=True, pos_att_type=["c2p"], **decoder()), "in_proj", 4, 4
    ),
    "ModernBERT": (causal("ModernBertForMaskedLM", **decoder(global_attn_every_n_layers=1)), "Wqkv", 4, 4),
    "litgpt": (litgpt_model, "qkv", 4, 2),
    "litgpt before 0.5.3": (lambda: Small("litgpt before 0.5.3", n_query_groups=2), "attn", 4, 2),
    "nanoGPT": (lambda: Small("nanogpt"), "c_attn", 4, 4),
    "timm": (lambda: Small("timm"), "qkv", 4, 4),
    "nn.MultiheadAttention": (Encoder, "in_proj_weight", 4, 4),
    "DeepSeek-V3, latent to keys and values": (causal("DeepseekV3ForCausalLM", **LATENT), "kv_b_proj", 4, 4),
    "JetMoE": (
        causal("JetMoeForCausalLM", **decoder(num_key_value_heads=2, kv_channels=8, num_local_experts=2)),
        "kv_proj", 4, 2,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def made(layout):
    """The model in float64, its fused modules or parameters by name, and how many heads they have."""
    make, child, *heads = LAYOUTS[layout]
    torch.manual_seed(0)
    model = make().double().eval()
    for module in model.modules():  # whatever initializes to zeros would show no derivative
        for param in module._parameters.values():
            if param is not None and param.dim() >= 2:
                nn.init.normal_(param, std=0.1)
    names = [
        name.removesuffix(".weight")
        for name, param in model.named_parameters()
        if name.removesuffix(".weight").endswith(f".{child}") and param.dim() == 2
    ]
    assert names
    return model, names, heads


def loss_of(model, tokens):
    out = model(tokens)
    logits = out.logits if hasattr(out, "logits") else out
    return F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())


def weight_of(model, name):
    return dict(model.named_parameters()).get(f"{name}.weight", dict(model.named_parameters()).get(name))


def rows_in(model, name, axis):
    with sdpa_kernel(SDPBackend.MATH), Keep() as keep:
        loss_of(model, torch.randint(VOCAB, (2, 9)))
    return observed_rows(keep.results, weight_of(model, name), axis)


class Apart(nn.Module):
    """Stands in for a fused projection: one layer of its kind for each part, results put back in its order."""

    def __init__(self, fused, rows):
        super().__init__()
        self.order = torch.cat(list(rows.values())).argsort()
        for role, found in rows.items():
            part = copy.deepcopy(fused)
            axis = int(isinstance(fused, Conv1D))
            part.weight = nn.Parameter(fused.weight.detach().index_select(axis, found))
            if fused.bias is not None:
                part.bias = nn.Parameter(fused.bias.detach()[found])
            if axis:
                part.nf = len(found)
            self.add_module(role, part)

    def forward(self, x):
        return torch.cat([part(x) for part in self.children()], dim=-1)[..., self.order]


def separated(model, names, rows):
    """A copy of ``model`` with separate weights in place of every fused one."""
    twin = copy.deepcopy(model)
    for name in names:
        parent, _, child = name.rpartition(".")
        holder = twin.get_submodule(parent)
        if isinstance(holder, nn.MultiheadAttention):
            for role, found in rows.items():
                holder.register_parameter(f"{role[0]}_proj_weight", nn.Parameter(holder.in_proj_weight.detach()[found]))
            holder.register_parameter("in_proj_weight", None)
            holder._qkv_same_embed_dim = False
        else:
            setattr(holder, child, Apart(getattr(holder, child), rows))
    return twin


def parts_of(twin, name, rows):
    holder = twin.get_submodule(name.rpartition(".")[0])
    if isinstance(holder, nn.MultiheadAttention):
        return {role: getattr(holder, f"{role[0]}_proj_weight") for role in rows}
    return {role: part.weight for role, part in twin.get_submodule(name).named_children()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_and_heads_are_those_of_the_forward(layout):
    model, names, (n_head, n_query_groups) = made(layout)
    optimizer = AdaPM(model.parameters(), second_moment="block")
    for name in names:
        weight = weight_of(model, name)
        pieces = optimizer.pieces[weight]
        axis = int(pieces[0].transposed)
        numbers = torch.arange(weight.shape[axis]).unsqueeze(1 - axis).expand(weight.shape)
        ours = {piece.role: piece.matrix(numbers).select(1 - axis, 0).sort().values for piece in pieces}
        theirs = rows_in(model, name, axis)
        assert ours.keys() == theirs.keys()
        assert all(ours[role].equal(theirs[role]) for role in ours)
        heads = {"query": n_head, "key": n_query_groups, "value": None}
        assert {piece.role: piece.heads for piece in pieces} == {role: heads[role] for role in ours}


@pytest.mark.parametrize(
    ("layout", "second_moment"),
    [(layout, "block") for layout in LAYOUTS]  # the second moment that depends on rows and heads
    + [(layout, kind) for layout in ("GPT-2", "GPT-NeoX", "litgpt") for kind in ("elementwise", "factored")],
)
def test_training_fused_is_training_separate(layout, second_moment):
    model, names, _ = made(layout)
    axis = int(any(isinstance(module, Conv1D) for module in model.modules()))
    rows = rows_in(model, names[0], axis)
    train_both(
        model, names, rows, {rf"\.{role}\.weight$|{role[0]}_proj_weight$": role for role in rows}, second_moment, axis
    )


@pytest.mark.parametrize("second_moment", ["elementwise", "block"])
def test_a_gate_and_up_projection_is_two(second_moment):
    model, _, _ = made("Phi-3")
    mlp, inputs = model.model.layers[0].mlp, []
    handle = mlp.activation_fn.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    loss_of(model, torch.randint(VOCAB, (2, 9)))
    handle.remove()
    (grad,) = torch.autograd.grad(inputs[0].sum(), mlp.gate_up_proj.weight)
    is_gate = grad.abs().sum(1) > 0
    rows = {"gate": is_gate.nonzero().flatten(), "up": (~is_gate).nonzero().flatten()}
    names = [f"model.layers.{index}.mlp.gate_up_proj" for index in range(2)]
    train_both(model, names, rows, {r"gate_up_proj\.(gate|up)\.weight$": "mlp"}, second_moment)


def train_both(model, names, rows, taught, second_moment, axis=0):
    """Train ``model`` and its twin with separate weights on the same tokens; every weight must agree."""
    twin = separated(model, names, rows)
    # eps: a bias of all keys has no gradient but rounding errors, which must not be divided by their own size
    options = {
        "lr": 1e-2,
        "eps": 1e-6,
        "rank": 3,
        "update_proj_gap": 10,
        "momentum": "compact",
        "second_moment": second_moment,
        "state_dtype": None,
    }
    ours = AdaPM(model.named_parameters(), **options)
    theirs = AdaPM(twin.named_parameters(), roles=taught, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(13):  # every basis is refreshed twice
        tokens = torch.randint(VOCAB, (2, 9), generator=generator)
        for each, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            loss_of(each, tokens).backward()
            optimizer.step()
    for name in names:
        weight = weight_of(model, name)
        for role, part in parts_of(twin, name, rows).items():
            assert relative_difference(weight.index_select(axis, rows[role]), part) < 1e-8
    others = dict(twin.named_parameters())
    differences = {n: relative_difference(p, others[n]) for n, p in model.named_parameters() if n in others}
    assert max(differences.values()) < 1e-8, differences


def test_a_list_of_names_does_not_tell_every_layout():
    model, _, _ = made("DeBERTa")
    with pytest.raises(ValueError, match=r"attention.self.in_proj.weight .*Pass model.named_parameters\(\) itself"):
        AdaPM(names_alone(model))
    optimizer, whole = AdaPM(list(model.named_parameters())), AdaPM(model.parameters())
    assert optimizer.pieces == whole.pieces  # the live model tells
