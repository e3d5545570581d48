"""The tables by which :mod:`lightning_adapm.roles.find` finds roles. New architectures belong here.

All patterns are regular expressions on lower-case names without ``.weight``; roles are those of
:data:`lightning_adapm.roles.piece.ROLES` and :data:`FUSED`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

INTERLEAVED = "qkv_interleaved"
FUSED = ("qkv", INTERLEAVED, "kv")
"""Roles of fused weights, whose pieces have other roles.

Rows of ``qkv`` are all queries, then all keys, then all values, unless the module is known to have them otherwise.
Those of :data:`INTERLEAVED` are the queries, the key and the value of one head, or of heads with a common key, then of
the next.
"""

_BEFORE = (
    r"(?:(?:(?:to|add|w|lin|linear|proj|project|projection|fc|dense|pos|layout|w2e|e2w|e2e)_?)"
    r"|(?:c|attn|mha|self|mat)_)*"
)
_AFTER = (
    r"(?:_?(?:proj|project|projection|lin|linear|layer|head|net|global|attn|up|down|(?:de)?compress|rope|nope|weight"
    r"|dense|transform|map|[abw]))*"
)

# Full matches of a projection's own name, for weights in one attention module.
CHILD_RULES: tuple[tuple[str, str], ...] = (
    (
        "qkv",
        # linear_qkv is Megatron's, whose rows are interleaved
        r"w?_?qkv(_?proj|_projection|_linear|_layer|_net|_fused)?|(c|fc|lin|proj|fused)_qkv|(\w+_)?attn_qkv|c_attn"
        r"|att_proj|query_key_value|w_pack|to_qkv|mixed_qkv|in_proj_weight",
    ),
    ("query", rf"{_BEFORE}(qs?|quer(y|ies)|query_key){_AFTER}"),  # query_key: Reformer's, shared by both
    # down, up and rotary projections under the letters of DeepSeek-V2's paper; the common latent is treated as values
    ("query", r"w_?(dq|uq|qr)"),
    ("key", r"w_?(uk|kr)"),
    ("value", rf"w_?(uv|dkv)|{_BEFORE}kv(_proj)?_(down|compress)(_proj)?"),
    ("key", rf"{_BEFORE}(ks?|keys?){_AFTER}"),
    # what relative positions are compared by: Conformer, Transformer-XL, XLNet, Funnel
    ("key", r"linear_pos|relative_k_proj|r|r_net|r_kernel"),
    ("value", rf"{_BEFORE}(vs?|values?){_AFTER}"),
    (
        "kv",
        r"w?_?kv(_proj|_projection|_linear|_layer|_net)?|(fc|lin|proj)_kv|to_kv|key_value|c_enc_kv"
        rf"|w?kv_[ab](_proj)?(_with_mqa)?|w_?ukv|{_BEFORE}kv(_proj)?_(up|decompress)(_proj)?",
    ),
    (
        "attn_out",
        r"(w|fc)?_?o|o_?(proj|lin|net)|out_?(proj|lin|linear)|(linear|to|to_add|fc|attention|(\w+_)?attn)_out|\w+_attn_proj|out|output(_proj)?|linear_proj"
        r"|proj|c_proj|post|post_proj|projection(_layer)?|dense|linear|final_(linear|proj|projection)|resid_proj|merge(_heads)?"
        rf"|{_BEFORE}(o|out|output){_AFTER}|w?_?(concat|combine|unify_?heads)(_heads)?(_proj|_linear)?|fc",
    ),
)

# Those names that another layer next to an attention's output has as well, such as one that merges two streams.
OUTPUT_IF_ALONE = r"fc|merge(_heads)?|resid_proj|final_(proj|projection)"

# Those names that a layer outside attention rarely has.
OUTPUT_ONLY = r"(w|fc)?_?o|o_?(proj|lin|net)|out_?(proj|lin)|to_out|attn_out|attention_out"

# In the name of a layer that holds an attention's inputs, in whatever order.
FUSED_SOMEHOW = r"qkv|qvk|kqv|kvq|vqk|vkq"

# What holds an attention's inputs, and in parallel blocks an MLP's too; the name alone says neither.
INPUT_ONLY = r"in_proj"

LISTED = ("query", "key", "value", "attn_out")
"""Roles in a list of an attention's projections, in order."""

# Searched in the name, for what is found before any structure.
ADAPTER = (
    r"(^|[._])(lora|vera|hada|lokr|oft|hra|ia3)_|adaption_|trainable_tokens|gating_factor|adapter_(wte|scale|bias|down|up)"
    r"|(^|[._])adapters?\.(\w+\.)*\w*(down|up)|prompt_encoder\.\w+\.(embedding|transform|mlp_head|lstm_head)"
)
BIASES = r"bias(es)?_?\d*(_table)?$|(^|[._])bias_[a-z]$"
# The same for a parameter that is no layer's weight.
OWN_BIASES = r"(^|[._])b_?(q|k|v|o|in|out|\d)$"

# Recurrent and state-space mixers: AdaPM's table has nothing for them. By name and by the class of a module around.
MIXERS = (
    r"(^|\.)(\w*mamba2?|ssm|s4|linear_attn|linear_attention|rg_lru|time_mix\w*|\w*recurrent\w*|\w*lstm\w*"
    r"|\w*gru|rnn|retention|hyena|\w*delta_?net|mega_layer)\."
)
# What any mixing of tokens is called, attention as well: flash-attn, MetaFormer, Nemotron-H.
ANY_MIXER = r"(^|\.)\w*mixer\."
MIXER_CLASSES = (
    r"Mamba\w*Mixer$|^Mamba2?$|SSM|LSTM(Layer|Block|Cell)?$|GRU|RNN|RecurrentBlock$|Rwkv\w*Attention|DeltaNet$|ShortConv$"
    r"|LinearAttention$|Retention$|Hyena|RWKV_?T(ime)?_?[Mm]ix"
)
# Parameters that only a state-space module has: Mamba, Mamba-2, S4, Gated DeltaNet.
MIXER_PARAMETERS = ("A_log", "A_logs", "dt_bias")

# Anything else that is called attention; unknown matrices in it are refused.
_ATTENTION = r"(attn|attention|mha|_att(?=\.))\w*\."
ATTENTION = rf"(^|\.)\w*{_ATTENTION}"
ATTENTION_CLASSES = r"Attention|Attn|MultiHead|MHA$"

# Searched in this order where neither module type nor neighbors decide; the role None refuses.
NAME_RULES: tuple[tuple[str | None, str], ...] = (
    ("mlp", r"(^|\.|_)router(\.|$)"),
    ("query", r"attention\.experts\.input_linear$"),  # JetMoE's mixture of attention heads
    ("attn_out", r"attention\.experts\.output_linear$"),
    (None, rf"{_ATTENTION}(\w+\.)*experts\."),
    ("kv", rf"{_ATTENTION}kv_proj$"),
    ("key", rf"{_ATTENTION}(\w+\.)*pos_(key_)?proj$"),  # DeBERTa's and Gemma 3n's relative positions
    ("query", rf"{_ATTENTION}(\w+\.)*pos_q(uery)?_proj$"),
    ("qkv", rf"{_ATTENTION}(attn|(self\.)?in_proj)$"),
    (
        "attn_out",
        rf"{_ATTENTION}(((\w+_)?output|module)\.)*(o|w_?o|o_?proj|out_?lin|out(put)?_?proj|(linear_)?proj|c_proj|dense|to_out|output)$",
    ),
    # what shrinks an image before its keys and values: PVT, SegFormer
    ("mlp", rf"{_ATTENTION}(self\.)?(sr|(sequence|spatial)_reduction)$"),
    # fused with an MLP's, as in PaLM's parallel blocks, or of an attention whose other projections were not found
    (None, r"(^|\.)(\w+_)?(attn|attention|qkv)_(\w+_)?(ffn?|mlp|out|output|proj|projection)$"),
    ("lm_head", r"(^|\.)transformer\.ff_out$"),  # OLMo's own code
    # what shifts and scales a diffusion transformer's activations, from its conditioning
    ("mlp", r"(^|[._])(adaln_?(\w*modulation|single)?|modulation)(\.(lin|linear|\d+))?$|_mod(\.lin(ear)?)?$"),
    (
        "mlp",
        r"(^|\.|_)(mlps?(?!_heads?(\.|$))|ffns?|ff|feed_?forward|feed_forward_\w+|densereludense|moe|block_sparse_moe|experts?)(\.|_|$|\d)",
    ),
)
# The same, for weights outside everything that calls itself attention.
NAME_RULES_OUTSIDE: tuple[tuple[str, str], ...] = (
    ("query", r"(^|\.)(w_?q|q_?proj|q_lin|to_q)$"),
    ("key", r"(^|\.)(w_?k|k_?proj|k_lin|to_k)$"),
    ("value", r"(^|\.)(w_?v|v_?proj|v_lin|to_v)$"),
    ("mlp", r"(^|\.)(fc_?\d?|gate|gate_proj|up(_proj)?|down(_proj)?|gate_up_proj|c_fc|w[123]|linear_?[12])$"),
    ("mlp", r"(^|\.)(dense_h_to_4h|dense_4h_to_h|intermediate\.dense)$"),
    ("mlp", r"(^|\.|_)(patch_embed\w*|project_(in|out)|pooler)(\.|$)"),
    ("mlp", r"_(projection|projs?)(_weight)?(\.\d+)?$"),
    ("mlp", r"(^|\.)(pw_?conv|point_?wise(_conv)?)_?\d?$"),  # ConvNeXt
)
# Of a table of rows, which no linear layer or convolution uses.
EMBEDDINGS = (
    r"(^|\.|_)(wte|wpe|embed_tokens|embed_positions|tok_embeddings|pos(ition)?_emb(ed\w*)?|\w*embeddings?|\w*embed"
    r"|\w*(query|register|mask|detection|cls)_tokens?|latents?(_\dd)?|latent_query|quer(y|ies)|rel_pos_[hw]|emb_rel_[kv]"
    r"|position(al)?_embedding\w*|position_embeddings\.weights\.\d+|\w*positional_encoding|codevectors)$"
)
# The same for a parameter that is no layer's weight but its module's own, which only its name identifies.
TABLES: tuple[tuple[str, str], ...] = (
    ("bias", r"(^|[._])(\w*scale_shift_table|\w*modulation)$"),
    (
        "embedding",
        r"(^|[._])(pe|(\w*_)?pos(ition(al)?|itions)?(_?(enc|emb|code|table|param|token|query)\w*)?"
        r"|\w*(tokens?|prompts?|codebooks?|slots|embs?|encodings?|embedding_table))$",
    ),
)
# Outside transformer blocks.
HEADS = (
    r"(^|\.)(embed_out|output|unembed|output_layer|(\w+_)?heads?|score|(?!pre_)(\w+_)?classifier|qa_outputs|proj_out"
    r"|lm_output|objective|to_(logits|vocab|probs)|vocab_(proj|head)|seq_relationship)$"
    r"|(^|\.)(classifier|cls|lm_head|predictions|score|heads?|\w*_head|to_logits)\.(\w+\.)*(out_proj|decoder|fc|\d+)$"
)

# Why a matrix has no role, and what it most likely is; full momentum for all others.
IN_MIXER = "in a recurrent or state-space mixer"
IN_ATTENTION = "in an attention module, of an unknown name"
BESIDE_ATTENTION = "next to an attention's projections, with an unknown name"
LIKE_ATTENTION = "called as in attention, but not found in one"
HOLDS_MORE = "may hold an attention's inputs or outputs as well as an MLP's"
OWN = "a parameter of its module's own, of an unknown name"
DEPTHWISE = "a depthwise convolution"
CONVOLUTION = "a convolution"
NOTHING = "nothing matches"
GUESSES = {BESIDE_ATTENTION: "mlp", CONVOLUTION: "low_rank", NOTHING: "mlp"}


def guess(name: str, why: str) -> str:
    """Role or policy to suggest for a matrix that has none, by the reason ``why``."""
    if why == LIKE_ATTENTION:
        role = child_role(name.removesuffix(".weight").rpartition(".")[2].lower())
        return "full" if role is None or role in FUSED else role
    return GUESSES.get(why, "full")


@cache  # every layer of a model has the same names
def child_role(child: str) -> str | None:
    """Role of a projection in an attention module, by its own name."""
    return next((role for role, pattern in CHILD_RULES if re.fullmatch(pattern, child)), None)


def is_attention(children: Iterable[str]) -> bool:
    """Whether matrices of these names in one module are those of an attention module."""
    roles = {child_role(child) for child in children}
    if "query" in roles:
        return bool(roles & {"key", "value", "kv", "qkv"})
    return "qkv" in roles or {"key", "value", "attn_out"} <= roles  # the latter ask with a learned vector


def is_list_of_projections(path: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether an attention has all of its projections in one list, as in the Annotated Transformer.

    They have one shape there, as the layers of an MLP that pools by attention do not.
    """
    is_list = bool(re.search(rf"{_ATTENTION}linears$", path.lower()))
    return is_list and {*shapes} == {*map(str, range(len(LISTED)))} and len({*map(tuple, shapes.values())}) == 1


def first_match(table: Iterable[tuple[str | None, str]], stem: str) -> tuple[str | None, str] | None:
    """Find the first rule of a table that matches a name; a rule with the role None refuses it."""
    matches = ((role, re.search(pattern, stem)) for role, pattern in table)
    return next(((role, reason(found)) for role, found in matches if found), None)


def reason(found: re.Match[str]) -> str:
    """Reason that a match is reported as."""
    return f"name {found.group().strip('._')!r}"
