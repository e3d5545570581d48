"""Roles of parameters in a transformer.

Roles are found by module type, then by attention structure (projections in one module), then by name, with the tables
of :mod:`lightning_adapm.roles.rules`. The weight of an ``nn.Embedding`` is an embedding, whatever its name. A linear
layer of a transformer outside attention modules and recurrent mixers is an MLP: projections between widths, poolers,
connectors. A matrix without a match is reported, never guessed. :mod:`lightning_adapm.roles.fused` finds the rows of
fused weights.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_adapm.roles import rules
from lightning_adapm.roles.context import Named, normalize, plain
from lightning_adapm.roles.piece import POLICIES

_TAUGHT = "roles["


def find_role(item: Named, taught: Mapping[str, str] | None = None) -> tuple[str | None, str]:
    """Find the role of a parameter, and the reason.

    Args:
        item: The parameter with its context.
        taught: Regular expressions on the normalized name, searched in order before everything else. Their values are
            roles, which apply to matrices, or policies.

    Returns:
        One of :data:`~lightning_adapm.roles.piece.ROLES` or :data:`~lightning_adapm.roles.rules.FUSED`, or None without
        a match; and the reason.
    """
    for pattern, role in (taught or {}).items():
        if is_met(pattern, {item.name, item.label}) and fits(role, item.shape):
            return role, f"{_TAUGHT}{pattern!r}]"
    return _by_type(item) or _by_structure(item) or _by_name(item) or (None, _unknown(item))


def is_met(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern of the caller's rules matches any of some names, without wrappers and reparametrizations."""
    return any(re.search(pattern, spelled(name)) for name in names for spelled in (normalize, plain))


def is_taught(why: str) -> bool:
    """Whether a role is from the caller's own rules, by its reason."""
    return why.startswith(_TAUGHT)


def _by_type(item: Named) -> tuple[str | None, str] | None:
    stem, kinds = item.path.lower(), [type(user).__name__ for user in item.users]
    if item.in_adapter:
        return "adapter", "held by an adapter"
    if found := re.search(rules.ADAPTER, stem):
        return "adapter", rules.reason(found)
    if any(isinstance(user, (nn.Embedding, nn.EmbeddingBag)) for user in item.users):
        return "embedding", "used by nn.Embedding"
    if len(item.shape) < 2 or item.shape.numel() <= max(item.shape):  # or has no elements at all
        return ("bias" if stem.endswith("bias") else "norm"), "a vector"
    if any(re.search(r"norm(\dd)?$", kind, re.IGNORECASE) for kind in kinds):
        return "norm", "used by a norm"
    if found := re.search(rules.BIASES, stem) or (re.search(rules.OWN_BIASES, stem) if item.is_own else None):
        return "bias", rules.reason(found)
    if item.name.endswith(".weight") and any(kind.endswith("Embedding") for kind in kinds):
        return "embedding", "used by an embedding"
    return rules.first_match(rules.TABLES, stem) if item.is_own else None


def _by_structure(item: Named) -> tuple[str | None, str] | None:
    if item.in_mixer:
        return None, rules.IN_MIXER
    if item.joins_heads:
        return "attn_out", "projects the values of attention heads"
    if rules.is_list_of_projections(item.parent, {child: other.shape for child, other in item.beside.items()}):
        return rules.LISTED[int(item.child)], "place in a list of an attention's projections"
    if not rules.is_attention(item.beside):
        return None
    role = rules.child_role(item.child)
    if role == "qkv" and "q_attn" in item.beside:  # GPT-2's cross-attention
        role = "kv"
    outputs = [rules.child_role(child) for child in item.beside].count("attn_out")
    if outputs > 1 and re.fullmatch(rules.OUTPUT_IF_ALONE, item.child):
        return None  # `fc` is an MLP's, in a block without modules of its own
    return (role, "lies in an attention module") if role else None


def _by_name(item: Named) -> tuple[str | None, str] | None:
    stem = item.path.lower()
    if _is_table(item) and (found := re.search(rules.EMBEDDINGS, stem)):
        return "embedding", rules.reason(found)
    if rule := rules.first_match(rules.NAME_RULES, stem):
        return rule
    if item.in_attention:
        role = rules.child_role(item.child)
        if role in ("query", "key", "value") or (role == "attn_out" and item.holds_attention):
            return role, f"name {item.child!r}"
        return None, rules.IN_ATTENTION
    if item.is_head:
        return "lm_head", "has the shape of an embedding"
    if item.block_path is None and (found := re.search(rules.HEADS, stem)):
        return "lm_head", rules.reason(found)
    if re.fullmatch(rules.INPUT_ONLY, item.child) or _holds_more(item):
        return None, rules.HOLDS_MORE
    return rules.first_match(rules.NAME_RULES_OUTSIDE, stem) or _by_place(item)


def _holds_more(item: Named) -> bool:
    """Whether the first of two layers has other outputs than the second has inputs; Flux fuses attention into both."""
    first, second = item.beside.get("linear1"), item.beside.get("linear2")
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        return False
    width = second.shape[1]
    return (item is first or item is second) and first.shape[0] not in (width, 2 * width)


def _by_place(item: Named) -> tuple[str | None, str] | None:
    if rules.is_attention(item.beside):
        return None, rules.BESIDE_ATTENTION
    role = rules.child_role(item.child)
    if role not in (None, "attn_out") or re.search(rules.FUSED_SOMEHOW, item.child):
        return None, rules.LIKE_ATTENTION
    if re.fullmatch(rules.OUTPUT_ONLY, item.child) and not item.output_found:
        return None, rules.LIKE_ATTENTION
    if item.block_path is not None:
        return "mlp", "in a transformer block, outside its attention"
    if item.in_transformer and item.is_linear:
        return "mlp", "a linear layer of a transformer, outside attention"
    if item.in_stem and _is_convolution(item):
        return "mlp", "a convolution next to transformer blocks"
    if item.is_linear and any(_is_depthwise(other) for other in item.beside.values()):
        return "mlp", "a pointwise layer next to a depthwise convolution"
    return None


def _unknown(item: Named) -> str:
    if _is_depthwise(item):
        return rules.DEPTHWISE
    if _is_convolution(item):
        return rules.CONVOLUTION
    return rules.OWN if item.is_own else rules.NOTHING


def fits(role: str, shape: torch.Size) -> bool:
    """Whether a parameter can have this role or policy; a bias is no MLP, although an MLP's rule may match its name."""
    return len(shape) >= 2 or role in POLICIES or role in ("norm", "bias", "adapter")


def _is_table(item: Named) -> bool:
    """Whether a parameter is a table of rows, by the modules that use it, or else by its shape."""
    if item.users:
        return not (item.is_linear or _is_convolution(item))
    return len(item.shape) == 2 or item.shape[0] == 1


def _is_convolution(item: Named) -> bool:
    return any(isinstance(user, nn.modules.conv._ConvNd) for user in item.users)


def _is_depthwise(item: Named) -> bool:
    return any(isinstance(user, nn.modules.conv._ConvNd) and user.groups == user.in_channels > 1 for user in item.users)
