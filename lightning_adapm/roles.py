"""Roles: what a parameter is in the transformer.

Found by module type first (an ``nn.Embedding``'s weight is an embedding, whatever its name), then by attention
structure (projections that lie beside each other), then by name. The rules are data. A matrix that nothing matches
is reported, never guessed. Which rows of a fused weight are whose is the business of :mod:`lightning_adapm.attention`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_adapm.layout import shape_of

ROLES = ("embedding", "query", "key", "value", "attn_out", "mlp", "lm_head", "norm", "bias", "adapter")
"""What a piece of a parameter can be."""

FUSED = ("qkv", "kv")
"""Roles of weights that hold the rows of several; their pieces have roles from :data:`ROLES`."""

UNMATCHED = "unmatched"
POLICIES = ("none", "low_rank", "full")

_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_forward_module|_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|original_module|modules_to_save\.\w+)\."
)

# Full matches of a projection's own name, lower case, for weights that lie beside each other in one attention module.
CHILD_RULES: tuple[tuple[str, str], ...] = (
    ("qkv", r"qkv|qkv_?proj|c_attn|query_key_value|wqkv|w_pack|to_qkv|in_proj_weight|mixed_qkv|qkv_linear"),
    ("query", r"q|w_?q|q_?proj|q_?lin|to_q|query(_proj|_layer)?|linear_q|q_attn|q_[ab]_proj|w?q_[ab]|q_proj_weight"),
    ("key", r"k|w_?k|k_?proj|k_?lin|to_k|key(_proj|_layer)?|linear_k|k_proj_weight"),
    ("value", r"v|w_?v|v_?proj|v_?lin|to_v|value(_proj|_layer)?|linear_v|v_proj_weight"),
    ("kv", r"kv|w_?kv|kv_?proj|to_kv|key_value|kv_[ab]_proj|kv_a_proj_with_mqa|w?kv_[ab]"),
    ("attn_out", r"o|w_?o|o_?proj|out_?proj|out_?lin|proj|c_proj|dense|to_out(\.0)?|linear_out|out|wo"),
)

# Searched in this order in the normalised name without ".weight", lower case.
NAME_RULES: tuple[tuple[str, str], ...] = (
    ("adapter", r"lora_|(^|\.|_)adapter|gating_factor|prompt_encoder|(^|\.)ia3_"),
    ("qkv", r"(attn|attention)\w*\.(attn|in_proj)$"),
    ("attn_out", r"(attn|attention)\w*\.(\w+\.)*(o|w_?o|o_?proj|out_?proj|out_?lin|proj|c_proj|dense|to_out(\.0)?)$"),
    (
        "mlp",
        r"(^|\.|_)(mlps?|ffn?|ff|feed_?forward|feed_forward_\w+|densereludense|moe|block_sparse_moe|experts?|router)(\.|_|$|\d)",
    ),
    ("query", r"(^|\.)(w_?q|q_?proj|q_lin|to_q|query(_proj)?)$"),
    ("key", r"(^|\.)(w_?k|k_?proj|k_lin|to_k|key(_proj)?)$"),
    ("value", r"(^|\.)(w_?v|v_?proj|v_lin|to_v|value(_proj)?)$"),
    ("attn_out", r"(^|\.)(o_?proj|w_?o|out_lin)$"),
    (
        "embedding",
        r"(^|\.|_)(wte|wpe|embed_tokens|embed_positions|tok_embeddings|pos(ition)?_embed\w*|\w*embeddings?|\w*embed)$",
    ),
    (
        "lm_head",
        r"(^|\.)(lm_head|embed_out|output|unembed|output_layer|head|score|classifier|qa_outputs|proj_out|lm_output)$",
    ),
    ("lm_head", r"(^|\.)(classifier|cls|lm_head|predictions|score|head)\.(\w+\.)*(dense|out_proj|decoder|linear|\d+)$"),
    (
        "mlp",
        r"(^|\.)(fc_?\d?|gate|gate_proj|up_proj|down_proj|gate_up_proj|c_fc|w[123]|linear_?[12]|dense_h_to_4h|dense_4h_to_h)$",
    ),
    ("mlp", r"(^|\.|_)(patch_embed\w*|project_(in|out)|embed\w*_(projection|proj|hidden_mapping_in)|pooler)\."),
)


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that has one role: all of it, or a slice ``start`` to ``stop`` of each of ``groups``
    equal groups of rows (of columns, where the weight is ``transposed``) of a fused weight.

    ``heads`` is how many equal row blocks it consists of, for Adam-mini's second moment, where that is known; ``flat``
    says that all dimensions but the first are one (a convolution), where a third dimension is else a stack of matrices;
    ``transposed`` says that outputs are columns (Hugging Face's ``Conv1D``); ``dim`` is how many dimensions the
    parameter had when its role was found; ``block`` is the number of the transformer block around it, 0 outside.
    """

    role: str
    start: int = 0
    stop: int | None = None
    groups: int = 1
    heads: int | None = None
    flat: bool = False
    transposed: bool = False
    dim: int = 2
    block: int = 0

    @property
    def whole(self) -> bool:
        return self.stop is None

    @property
    def prefix(self) -> str:
        """Of this piece's keys in the optimizer's state."""
        return "" if self.whole else f"{self.role}."

    def view(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor of the parameter's shape; shares memory with it."""
        if self.stop is None:
            return tensor
        axis, length = int(self.transposed), self.stop - self.start
        if self.groups == 1:
            return tensor.narrow(axis, self.start, length)
        return tensor.unflatten(axis, (self.groups, -1)).narrow(axis + 1, self.start, length)

    def shape(self, whole: torch.Size) -> torch.Size:
        """Of the :meth:`matrix` of a parameter of shape ``whole``."""
        return self.matrix(torch.empty(whole, device="meta")).shape

    def matrix(self, tensor: Tensor) -> Tensor:
        """:meth:`view` as a matrix or a stack of matrices; as it is where it has fewer than two dimensions."""
        view = self.view(tensor)
        if self.flat:
            return view.flatten(1)
        axis = int(self.transposed)
        return view.flatten(axis, axis + 1) if self.groups > 1 else view


@dataclass
class Named:
    """One parameter with what is known about it."""

    name: str
    param: Tensor
    shape: torch.Size = field(init=False)
    """Of the whole parameter, whatever this process holds of it."""
    users: list[nn.Module] = field(default_factory=list)
    """Modules that hold it, and those around them, from the inside out."""
    around: list[nn.Module] = field(default_factory=list)
    beside: dict[str, "Named"] = field(default_factory=dict)
    """Matrices in the same module, by their own names: of a query projection the key's, the value's, the output's."""
    in_block: bool = False
    """Inside a transformer block, outside its attention."""
    is_head: bool = False
    """Outside every block, and of an embedding's shape."""

    def __post_init__(self) -> None:
        self.shape = shape_of(self.param)

    @property
    def path(self) -> str:
        """The normalised name without ``.weight``."""
        return re.sub(r"(\.(linear|inner_linear))?\.weight$", "", normalize(self.name))

    @property
    def block(self) -> int:
        """The first number in the path that does not number experts; 0 where there is none."""
        number = re.search(r"(?:^|(?<!experts)\.)(\d+)(?=\.|$)", self.path)
        return int(number[1]) if number else 0

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def child(self) -> str:
        return self.path.rpartition(".")[2].lower()


def normalize(name: str) -> str:
    """A parameter's name without what wrappers (FSDP, ``torch.compile``, Fabric, peft and others) put into it."""
    return _WRAPPERS.sub("", name)


def child_role(child: str) -> str | None:
    """What a projection would be if it lay in an attention module, by its own name."""
    return next((role for role, pattern in CHILD_RULES if re.fullmatch(pattern, child)), None)


def is_attention(children: Iterable[str]) -> bool:
    """Whether matrices of these names, lying beside each other, are those of an attention module."""
    roles = {child_role(child) for child in children}
    return "qkv" in roles or ("query" in roles and bool(roles & {"key", "kv"}))


def find_role(item: Named, rules: Mapping[str, str] | None = None) -> tuple[str | None, str]:
    """The role of one parameter (one of :data:`ROLES` or :data:`FUSED`; None where nothing matches), and why.

    ``rules`` (regular expressions on the normalised name, searched in order) come before everything else; their values
    are roles, which apply to matrices, or policies.
    """
    name, stem = normalize(item.name), item.path.lower()
    for pattern, role in (rules or {}).items():
        if re.search(pattern, name) and fits(role, item.shape):
            return role, f"roles[{pattern!r}]"
    if re.search(NAME_RULES[0][1], stem):
        return "adapter", "name"
    if any(isinstance(user, nn.Embedding) for user in item.users):
        return "embedding", "used by nn.Embedding"
    if len(item.shape) < 2 or item.shape.numel() == max(item.shape):
        return ("bias" if stem.endswith("bias") else "norm"), "a vector"
    if is_attention(item.beside):
        role_here = child_role(item.child)
        if role_here == "qkv" and "q_attn" in item.beside:  # GPT-2's cross-attention
            role_here = "kv"
        if role_here:
            return role_here, "lies in an attention module"
    for role, pattern in NAME_RULES:
        if re.search(pattern, stem):
            return role, "name"
    if item.is_head:
        return "lm_head", "has the shape of an embedding"
    if item.in_block and not is_attention(item.beside):
        return "mlp", "in a transformer block, outside its attention"
    return None, "nothing matches"


def fits(role: str, shape: torch.Size) -> bool:
    """Whether a parameter can have this role or policy: a bias is no MLP, though an MLP's rule may match its name."""
    return len(shape) >= 2 or role in POLICIES or role in ("norm", "bias", "adapter")


def describe(named: Iterable[tuple[str, Tensor]], module: nn.Module | None) -> list[Named]:
    """Join names with what the module tree says: which modules use a parameter, and what lies around them."""
    users: dict[int, list[nn.Module]] = {}
    around: dict[int, list[nn.Module]] = {}
    modules = dict(module.named_modules(remove_duplicate=False)) if module is not None else {}
    for path, user in modules.items():
        for param in user._parameters.values():
            if param is not None:
                users.setdefault(id(param), []).append(user)
                around.setdefault(id(param), []).extend(_ancestors(path, modules))
    items = [Named(name, param, users.get(id(param), []), around.get(id(param), [])) for name, param in named]
    link(items)
    return items


def link(items: Iterable[Named]) -> None:
    """Tell each parameter what lies beside it, and whether it is inside a transformer block."""
    items = list(items)
    modules: dict[str, dict[str, Named]] = {}
    embeddings = set()
    for item in items:
        if len(item.shape) >= 2 and not item.name.endswith("bias"):
            modules.setdefault(item.parent, {})[item.child] = item
        if any(isinstance(user, nn.Embedding) for user in item.users):
            embeddings.add(item.shape)
    attentions = [path for path, children in modules.items() if is_attention(children)]
    blocks = {match.group() for path in attentions if (match := re.match(r".*\.\d+(?=\.|$)|^\d+(?=\.|$)", path))}
    for item in items:
        item.beside = modules.get(item.parent, {})
        prefixes = {item.path[: dot.start()] for dot in re.finditer(r"\.", item.path)}
        item.in_block = bool(prefixes & blocks)
        item.is_head = len(item.shape) == 2 and not item.in_block and item.shape in embeddings


def _ancestors(path: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The module at ``path`` and those around it up to the root, nearest first."""
    parts = path.split(".") if path else []
    return [modules[prefix] for end in range(len(parts), -1, -1) if (prefix := ".".join(parts[:end])) in modules]
