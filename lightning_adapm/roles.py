"""Roles: what a parameter is in the transformer, and which rows of a fused weight are what.

The rules are data (:data:`NAME_RULES`, :data:`N_HEAD` and its neighbours). The module that uses a weight decides first (an
``nn.Embedding``'s weight is an embedding, whatever its name), then attention structure (how many rows of a fused
weight are query, key and value), then names. A matrix that nothing matches is reported, never guessed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

ROLES = ("embedding", "query", "key", "value", "attn_out", "mlp", "lm_head", "norm", "bias", "adapter")
"""What a piece of a parameter can be. A fused weight as a whole has the role ``qkv`` and pieces with roles from here."""

FUSED = "qkv"
UNMATCHED = "unmatched"
POLICIES = ("none", "low_rank", "full")

_WRAPPERS = re.compile(
    r"(^|(?<=\.))(_forward_module|_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\."
)

# Searched in this order in the normalised name, without a trailing ".weight" (or "_weight", as in in_proj_weight).
NAME_RULES: tuple[tuple[str, str], ...] = (
    ("adapter", r"lora_|(^|\.|_)adapter|gating_factor|prompt_encoder"),
    (FUSED, r"(^|\.)(qkv|qkv_proj|c_attn|query_key_value|in_proj|wqkv|w_pack)(\.linear)?$"),
    ("query", r"(^|\.)(q|wq|w_q|q_proj|q_lin|to_q|query|query_proj|q_[ab]_proj)(\.linear)?$"),
    ("key", r"(^|\.)(k|wk|w_k|k_proj|k_lin|to_k|key|key_proj)(\.linear)?$"),
    ("value", r"(^|\.)(v|wv|w_v|v_proj|v_lin|to_v|value|value_proj)(\.linear)?$"),
    ("attn_out", r"(^|\.)(o_proj|wo|w_o|out_proj|out_lin)(\.linear)?$"),
    ("attn_out", r"(^|\.|_)(attn|attention|self_attn|self_attention)\.(.*\.)?(proj|c_proj|dense|out|o|to_out\.0)(\.linear)?$"),
    ("embedding", r"(^|\.)(wte|wpe|embed_tokens|embed_positions|tok_embeddings|\w*embeddings?|\w*embed)$"),
    ("lm_head", r"(^|\.)(lm_head|embed_out|output|unembed|output_layer)(\.linear)?$"),
    ("mlp", r"(^|\.|_)(mlp|ffn|feed_forward|ff|moe|experts?|router)(\.|$)|(^|\.)(fc_?\d?|gate)(\.linear)?$"),
    ("mlp", r"(^|\.)(gate_proj|up_proj|down_proj|gate_up_proj|c_fc|w[123]|linear[12])(\.linear)?$"),
)

# How attention modules and their configurations call the same three numbers.
N_HEAD = ("n_head", "n_heads", "num_heads", "num_attention_heads", "nhead")
N_QUERY_GROUPS = ("n_query_groups", "num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_kv_head")
HEAD_SIZE = ("head_size", "head_dim")


@dataclass(frozen=True)
class Heads:
    """Attention heads, in litgpt's words; None is not known."""

    n_head: int | None = None
    n_query_groups: int | None = None
    head_size: int | None = None

    def of(self, role: str) -> int | None:
        """Heads in the rows of ``role``."""
        return {"query": self.n_head, "key": self.n_query_groups or self.n_head}.get(role)


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that has one role: all of it, or rows ``start`` to ``stop`` of a fused weight.

    ``heads`` is how many equal row blocks it consists of, for Adam-mini's second moment, where that is known; ``flat``
    says that all dimensions but the first are one (a convolution), where a third dimension is else a stack of matrices.
    ``dim`` is how many dimensions the parameter had when its role was found.
    """

    role: str
    start: int = 0
    stop: int | None = None
    heads: int | None = None
    flat: bool = False
    dim: int = 2

    @property
    def whole(self) -> bool:
        return self.stop is None

    @property
    def prefix(self) -> str:
        """Of this piece's keys in the optimizer's state."""
        return "" if self.whole else f"{self.role}."

    def view(self, tensor: Tensor) -> Tensor:
        """This piece of a tensor of the parameter's shape; shares memory with it."""
        return tensor if self.stop is None else tensor.narrow(0, self.start, self.stop - self.start)

    def matrix(self, tensor: Tensor) -> Tensor:
        """:meth:`view` as a matrix or a stack of matrices; as it is where it has fewer than two dimensions."""
        view = self.view(tensor)
        return view.flatten(1) if self.flat else view


@dataclass
class Named:
    """One parameter with what is known about it."""

    name: str
    param: Tensor
    users: list[nn.Module] = field(default_factory=list)
    heads: Heads = Heads()
    attn_out: Tensor | None = None
    """The output projection beside a fused weight: its columns are the query's rows."""


def normalize(name: str) -> str:
    """A parameter's name without what wrappers (DDP, FSDP, ``torch.compile``, Fabric, checkpointing) put into it."""
    return _WRAPPERS.sub("", name)


def find_role(item: Named, rules: Mapping[str, str] | None = None) -> str | None:
    """The role of one parameter, ``qkv`` for a fused weight, None where nothing matches.

    ``rules`` (regular expressions on the normalised name, searched in order) come before everything else; their values
    are roles or policies.
    """
    name = normalize(item.name)
    for pattern, role in (rules or {}).items():
        if re.search(pattern, name):
            return role
    stem = re.sub(r"[._]weight$", "", name).lower()
    if re.search(NAME_RULES[0][1], stem):
        return "adapter"
    if any(isinstance(user, nn.Embedding) for user in item.users):
        return "embedding"
    if item.param.dim() < 2:
        return "bias" if stem.endswith("bias") else "norm"
    return next((role for role, pattern in NAME_RULES if re.search(pattern, stem)), None)


def cut(item: Named, role: str) -> tuple[Piece, ...]:
    """The pieces of one parameter.

    Raises:
        ValueError: the rows of a fused weight cannot be told apart.
    """
    if role != FUSED:
        flat = item.param.dim() > 3 or any(isinstance(user, nn.modules.conv._ConvNd) for user in item.users)
        return (Piece(role, heads=item.heads.of(role), flat=flat and item.param.dim() > 2, dim=item.param.dim()),)
    rows, heads = item.param.shape[0], item.heads
    if heads.n_head and heads.head_size:
        query = heads.n_head * heads.head_size
    elif item.attn_out is not None:
        query = item.attn_out.shape[-1]
    else:
        query = rows // 3 if rows == 3 * item.param.shape[-1] else 0
    key, odd = divmod(rows - query, 2)
    groups = heads.n_query_groups or heads.n_head
    if query <= 0 or key <= 0 or odd or (groups and heads.head_size and key != groups * heads.head_size):
        raise ValueError(
            f"{item.name} of shape {tuple(item.param.shape)} holds query, key and value rows, but which rows are whose is"
            f" not known ({heads}). Pass model.named_parameters() itself rather than a list made from it, or give the"
            " parameter group n_head=, n_query_groups= and head_size=."
        )
    return (
        Piece("query", 0, query, heads.of("query")),
        Piece("key", query, query + key, heads.of("key")),
        Piece("value", query + key, rows),
    )


def describe(named: Iterable[tuple[str, Tensor]], module: nn.Module | None, heads: Heads = Heads()) -> list[Named]:
    """Join names with what the module tree says: which modules use a parameter, and the heads of its attention."""
    users: dict[int, list[nn.Module]] = {}
    parents: dict[int, list[nn.Module]] = {}
    if module is not None:
        modules = dict(module.named_modules(remove_duplicate=False))
        for path, user in modules.items():
            for param in user._parameters.values():
                if param is not None:
                    users.setdefault(id(param), []).append(user)
                    parents.setdefault(id(param), []).extend(_ancestors(path, modules))
    items = []
    for name, param in named:
        around = parents.get(id(param), []) if heads == Heads() else []
        found = next((found for parent in around if (found := find_heads(parent))), heads)
        items.append(Named(name, param, users.get(id(param), []), found))
    return items


def link_siblings(items: Iterable[Named]) -> None:
    """Give each fused weight the output projection beside it, by name."""
    by_name = {normalize(item.name): item for item in items}
    for name, item in by_name.items():
        stem = re.sub(r"qkv(\.linear)?\.(weight|bias)$", "", name)
        if stem != name and f"{stem}proj.weight" in by_name:
            item.attn_out = by_name[f"{stem}proj.weight"].param


def _ancestors(path: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """From a module's parent up to the root, nearest first."""
    parts = path.split(".")
    return [modules[".".join(parts[:end])] for end in range(len(parts) - 1, -1, -1) if ".".join(parts[:end]) in modules]


def find_heads(module: nn.Module) -> Heads | None:
    """The head counts that an attention module, or its ``config``, states; None if it states none."""
    for holder in (module, getattr(module, "config", None)):
        n_head = _first(holder, N_HEAD)
        if n_head:
            head_size = _first(holder, HEAD_SIZE)
            if head_size is None and (width := _first(holder, ("n_embd", "hidden_size", "embed_dim"))):
                head_size = width // n_head
            return Heads(n_head, _first(holder, N_QUERY_GROUPS) or n_head, head_size)
    return None


def _first(holder: Any, names: Iterable[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(holder, name, None), int)), None)
