"""Attention structure: head counts, and the rows of queries, keys and values in a fused weight."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import nn

from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.roles.context import Named
from lightning_adapm.roles.live import attribute
from lightning_adapm.roles.piece import Piece
from lightning_adapm.roles.rules import ATTENTION_CLASSES, FUSED, INTERLEAVED, child_role

# Names of head counts in attention modules and their configurations.
N_HEAD = (
    "n_head",
    "n_heads",
    "num_heads",
    "num_attention_heads",
    "nhead",
    "heads",
    "num_head",
    "nheads",
    "n_attention_heads",
    "attention_heads",
    "num_attn_heads",
    "n_attn_heads",
    "attn_heads",
    "head_num",
    "heads_num",
    "n_local_heads",  # Meta's llama
    "no_heads",  # OpenFold
)
N_QUERY_GROUPS = (
    "n_query_groups",
    "num_key_value_heads",
    "n_kv_heads",
    "num_kv_heads",
    "n_kv_head",
    "kv_n_heads",
    "kv_heads",
    "n_local_kv_heads",
    "n_head_kv",
    "num_heads_kv",
    "num_head_kv",
    "num_query_groups",
    "n_local_heads",  # gpt-fast
)
N_HEAD_OF_ATTENTION = "h"
"""Name of a head count in an attention module alone; elsewhere it may be a height."""
CONFIGS = ("config", "cfg", "args", "hparams")

# Fused weights whose rows are interleaved by head, (query..., key, value) for each query group; all others hold all
# queries, then all keys, then all values. By the projection's name and a part of the attention module's class name.
_INTERLEAVED: tuple[tuple[str, str], ...] = (
    ("query_key_value", "GPTNeoX|Bloom|Falcon|Persimmon"),
    ("attn", ""),  # litgpt before 0.5.3
    ("in_proj", "Disentangled"),  # DeBERTa
    ("c_attn", "GPTBigCode"),
    ("wqkv", "InternLM2"),
    ("qkv_proj", "MiniMaxLightning"),
)
_IN_EITHER_WAY: tuple[tuple[str, str], ...] = (("query_key_value", "GLM"),)
"""Fused weights whose name alone means interleaved rows, and the modules that do not interleave them."""
AMBIGUOUS = ("in_proj", "wqkv")  # read in either way: only the module tells
CODEGEN_PARTITIONS = 4  # CodeGen's qkv_proj: (query, value, key) in each of four partitions

GATE_UP = r"gate_up(_proj)?|gate_and_up_proj"  # an MLP's gate and up projections, one after the other: Phi-3, GLM

# Modules whose weights have outputs as columns, in addition to those that shapes identify.
TRANSPOSED = ("Conv1D", "AriaGroupedExpertsGemm")


@dataclass(frozen=True)
class Heads:
    """Head counts under litgpt's names; None where unknown. Only callers give ``head_size``, because rows show it."""

    n_head: int | None = None
    n_query_groups: int | None = None
    head_size: int | None = None


def find_heads(around: Iterable[nn.Module]) -> Heads:
    """Read head counts from the nearest module or its configuration."""
    for module in around:
        holders = [module, *(attribute(module, name) for name in CONFIGS)]
        n_head = _first(holders, N_HEAD)
        if not n_head and re.search(ATTENTION_CLASSES, type(module).__name__):
            n_head = _first((module,), (N_HEAD_OF_ATTENTION,))
        if n_head:
            return Heads(n_head, _first(holders, N_QUERY_GROUPS))
    return Heads()


def _first(holders: Iterable[Any], names: Iterable[str]) -> int | None:
    values = (_stated(holder, name) for holder in holders for name in names)
    counts = (int(value) for value in values if isinstance(value, Integral))
    return next((count for count in counts if count > 0), None)


def _stated(holder: Any, name: str) -> Any:
    return holder.get(name) if issubclass(type(holder), Mapping) else attribute(holder, name)


def cut(item: Named, role: str, stated: Heads = Heads(), taught: bool = False) -> tuple[Piece, ...]:
    """Cut one parameter into pieces. Head counts that the caller ``stated`` take precedence over those of modules.

    ``taught``: The caller has named the role, and with it the order of a fused weight's rows that no module shows.

    Raises:
        ValueError: The rows of a fused weight are unknown.
    """
    with_heads = role in ("query", "key", "kv", *FUSED)  # others are not asked: modules far around would be searched
    heads = find_heads(item.around) if with_heads and not stated.n_head else stated
    if item.in_one_head:
        heads = Heads(1, 1)
    if role == "kv":
        return _cut_kv(item, heads)
    if role in FUSED:
        return _cut_qkv(item, heads, role if taught else None)
    if role == "mlp" and re.fullmatch(GATE_UP, item.child) and len(item.shape) == 2 and item.shape[0] % 2 == 0:
        half = item.shape[0] // 2
        return (Piece(role, 0, half, part="gate"), Piece(role, half, 2 * half, part="up"))
    dim = len(item.shape)
    count = heads.n_head if role == "query" else (heads.n_query_groups or heads.n_head) if role == "key" else None
    if count and role == "key" and dim == 2 and not heads.n_query_groups:
        count = _key_heads(item, count)
    flat, transposed = _is_flat(item, role), is_transposed(item, role)
    return (Piece(role, heads=count, flat=flat, transposed=transposed, dim=dim),)


def is_transposed(item: Named, role: str) -> bool:
    """Whether outputs are columns, as in Hugging Face's ``Conv1D``, stacks of experts and XLNet's projections."""
    kinds, shape = [type(user).__name__ for user in item.users], item.shape
    if any(kind.endswith(TRANSPOSED) for kind in kinds):
        return True
    if role in FUSED and len(shape) == 2 and shape[1] == 3 * shape[0]:
        # only the shape says so, as for GPT-2's c_attn given by name
        return not any(kind.endswith("Linear") for kind in kinds)
    if len(item.shape) != 3:
        return False
    if role in ("query", "key", "value"):  # (inputs, heads, head size)
        return _is_flat(item, role)
    up, down = item.beside.get("gate_up_proj"), item.beside.get("down_proj")
    if up is None or down is None or len(up.shape) != 3 or len(down.shape) != 3:
        return False
    by_rows, by_columns = (up.shape[-2], down.shape[-1]), (up.shape[-1], down.shape[-2])
    return by_columns[0] == 2 * by_columns[1] and by_rows[0] != 2 * by_rows[1]


def _is_flat(item: Named, role: str) -> bool:
    """Whether all dimensions but the first count as one, as in a convolution, or an attention's heads and head size."""
    if len(item.shape) != 3 or any(isinstance(user, nn.modules.conv._ConvNd) for user in item.users):
        return len(item.shape) > 2
    in_attention = role in ("query", "key", "value", "attn_out")
    return in_attention and item.shape[1] == find_heads(item.around).n_head


def _roles_beside(item: Named) -> dict[str | None, Named]:
    return {child_role(child): other for child, other in item.beside.items()}


def _key_heads(item: Named, n_head: int) -> int | None:
    """Number of heads of a key without its own count: as many as its rows fit at the query's head size.

    Of several queries, as in multi-head latent attention, the one with the most rows holds the heads.
    """
    queries = [other for child, other in item.beside.items() if child_role(child) == "query"]
    if any(query.packed for query in queries):
        return None
    return max(1, item.shape[0] * n_head // max((query.shape[0] for query in queries), default=item.shape[0]))


def _cut_qkv(item: Named, heads: Heads, taught: str | None) -> tuple[Piece, ...]:
    shape, transposed = item.shape, is_transposed(item, "qkv")
    total, inner = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
    query = _query_rows(item, heads, total, inner)
    key = (total - query) // 2
    wanted = (heads.n_query_groups or heads.n_head or 0) * (heads.head_size or 0)
    untold = not item.users and item.child in AMBIGUOUS
    if query <= 0 or key <= 0 or query + 2 * key != total or wanted not in (0, key) or untold:
        raise ValueError(_unknown_rows(item, heads))
    n_head, groups = heads.n_head, None
    if n_head:
        groups = key * n_head // query
        fewer = key != query and groups != heads.n_query_groups  # or values of another head size: nobody says which
        if query % n_head or groups * query != key * n_head or fewer:
            raise ValueError(_unknown_rows(item, heads))
    if re.search("CodeGen", _kinds(item)):
        return _in_groups(
            CODEGEN_PARTITIONS, {"query": (query, n_head), "value": (key, None), "key": (key, groups)}, item
        )
    rows = {"query": (query, n_head), "key": (key, groups), "value": (key, None)}
    if groups == 1 or not _is_interleaved(item, taught):
        return _in_groups(1, rows, item)
    if groups is None or query % groups or key % groups:
        raise ValueError(_unknown_rows(item, heads))
    return _in_groups(groups, rows, item)


def _kinds(item: Named) -> str:
    """Names of the classes of the attention module and their bases; adapters may be between it and a projection."""
    return " ".join(base.__name__ for module in item.around[1:3] for base in type(module).__mro__)


def _is_interleaved(item: Named, taught: str | None) -> bool:
    """Whether the rows are those of one head after another; a warning says so where the name alone decides."""
    kinds = _kinds(item)
    if taught == INTERLEAVED or _matches(item, kinds, _INTERLEAVED):
        return True
    if taught or _matches(item, kinds, _IN_EITHER_WAY) or item.child not in dict(_IN_EITHER_WAY):
        return False
    if kinds:  # without a live module the name is that of checkpoints
        warn_caller(
            f"{item.child} of {type(item.around[1]).__name__} is taken to hold query, key and value rows of one head"
            f" after another, as GPT-NeoX's does. Write roles={{{item.child!r}: 'qkv'}} if all queries come first,"
            f" then all keys, then all values, or {INTERLEAVED!r} to say that this is right"
        )
    return True


def _matches(item: Named, kinds: str, rules: Iterable[tuple[str, str]]) -> bool:
    return any(item.child == child and re.search(part, kinds) for child, part in rules)


def _query_rows(item: Named, heads: Heads, total: int, inner: int) -> int:
    """Number of the query's rows among ``total``; 0 where unknown.

    The inputs of the output projection are the outputs of the query's heads, whatever a configuration has.
    """
    if heads.n_head and heads.head_size:
        return heads.n_head * heads.head_size
    out = _roles_beside(item).get("attn_out")
    if out is not None and not out.packed:
        conv = any(type(user).__name__.endswith("Conv1D") for user in out.users)
        rows = out.shape[0 if conv else 1]
        if 0 < rows < total:
            return rows
    if heads.n_head:
        parts = heads.n_head + 2 * (heads.n_query_groups or heads.n_head)
        if total % parts == 0:
            return heads.n_head * (total // parts)
    return total // 3 if total == 3 * inner else 0


def _cut_kv(item: Named, heads: Heads) -> tuple[Piece, ...]:
    """Split keys and values in one weight: halves, or multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    transposed = is_transposed(item, "kv")
    total, groups = item.shape[int(transposed)], heads.n_query_groups or heads.n_head
    module = item.around[1] if len(item.around) > 1 else None
    holders = (module, attribute(module, "config"))
    nope, head = _first(holders, ("qk_nope_head_dim", "qk_head_dim")), _first(holders, ("v_head_dim",))
    rope = _first(holders, ("qk_rope_head_dim",))
    if "kv_a" in item.child:
        # The latent that keys and values are made from, then the one rotary key that all heads share.
        if rope is None or rope >= total:
            raise ValueError(_unknown_rows(item, heads))
        return (
            Piece("value", 0, total - rope, transposed=transposed),
            Piece("key", total - rope, total, 1, 1, transposed=transposed),
        )
    if nope and head and total % (nope + head) == 0:
        groups = total // (nope + head)
        return _in_groups(groups, {"key": (groups * nope, groups), "value": (groups * head, None)}, item)
    if total % 2 or re.search("kv_b|ukv|kv.*_(up|decompress)", item.child):
        raise ValueError(_unknown_rows(item, heads))
    return _in_groups(1, {"key": (total // 2, groups), "value": (total // 2, None)}, item)


def _in_groups(groups: int, rows: dict[str, tuple[int, int | None]], item: Named) -> tuple[Piece, ...]:
    """Make the pieces of a weight with ``groups`` equal groups, each with its share of every role's rows in order."""
    pieces, start, dim = [], 0, len(item.shape)
    transposed = is_transposed(item, "qkv")
    for role, (count, heads) in rows.items():
        stop = start + count // groups
        pieces.append(Piece(role, start, stop, groups, heads, dim > 2, transposed, dim))
        start = stop
    return tuple(pieces)


def _unknown_rows(item: Named, heads: Heads) -> str:
    if len(item.shape) == 3 and item.shape[0] == 3 and not _is_flat(item, "qkv"):  # modded-nanogpt's
        return (
            f"{item.name} of shape {tuple(item.shape)} is a stack of queries, keys and values, which is not cut. Write"
            f" roles={{{item.child!r}: 'value'}} to treat each of its matrices as values are treated"
        )
    return (
        f"{item.name} of shape {tuple(item.shape)} holds query, key and value rows, but which rows are whose is"
        f" not known ({heads}). Pass model.named_parameters() itself rather than a list made from it, or give the"
        " parameter group n_head=, n_query_groups= and head_size=."
    )
