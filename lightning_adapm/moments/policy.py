"""AdaPM's table of moments: those of a piece, by its role, shape and group options."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum, NoMomentum
from lightning_adapm.moments.quantized import eight_bits_for
from lightning_adapm.moments.second import BlockSecondMoment, ElementwiseSecondMoment, FactoredSecondMoment
from lightning_adapm.moments.storage import EXACT, Storage
from lightning_adapm.roles.piece import POLICIES, ROLES, UNMATCHED, Piece

# arXiv 2510.09103, Section 3; the paper says nothing of an untied head, norms, biases and adapters.
PAPER_MOMENTUM: Mapping[str, str] = {
    "embedding": "none",
    "query": "low_rank",
    "key": "low_rank",
    "value": "full",
    "attn_out": "none",
    "mlp": "low_rank",
    "lm_head": "low_rank",
    "norm": "full",
    "bias": "full",
    "adapter": "full",
}
DEFAULT_MOMENTUM: Mapping[str, str] = {**dict.fromkeys(PAPER_MOMENTUM, "full"), "mlp": "low_rank"}
"""AdaPM's, because on tokens every other role was worth its momentum, which eight bits make affordable."""
DEFAULT_RANK = 0.05
HALF_FACTORS: Mapping[str, str] = {"low_rank": "bfloat16"}
DEFAULT_STATE_DTYPE: Mapping[str, str] = {"full": "int8", **HALF_FACTORS}
PRESETS = {
    "paper": PAPER_MOMENTUM,
    "compact": {**PAPER_MOMENTUM, "embedding": "low_rank", "attn_out": "low_rank"},
}
"""Named tables, which do not change with the default. In ``compact`` only values and vectors keep full momentum."""
_NO_MOMENTUM = f"momentum must be one of {', '.join(map(repr, (*POLICIES, *PRESETS)))}, or policies by role, but got "
_PHASES, _PHASES_OF_SMALL, _SMALL = 4, 2, 1 << 22
"""Phases of the refreshes, by the number of the transformer block, and those of matrices with fewer elements, which do
not fill a GPU one by one. Several phases spread the cost over steps; few phases share kernels.
"""
_SMALL_ROLES = ("norm", "bias", "adapter")
SECOND_MOMENTS = ("elementwise", "block", "factored")


def momentum_table(overrides: Mapping[str, str] | str | None, unmatched: str) -> dict[str, str]:
    """Make the table of policies: the default with ``overrides`` by role, one policy for all roles, or a preset.

    Raises:
        ValueError: A role, policy or preset is unknown.
    """
    if isinstance(overrides, str):
        table, overrides = _named_table(overrides), {}
    elif isinstance(overrides, Mapping | None):
        table = dict(DEFAULT_MOMENTUM)
    else:
        raise ValueError(f"{_NO_MOMENTUM}{overrides!r}; the decay of an average is another option, betas or mu")
    if unmatched != "error":
        table.setdefault(UNMATCHED, unmatched)
    for role, policy in (overrides or {}).items():
        if role not in (*ROLES, UNMATCHED):
            raise ValueError(f"momentum: {role!r} is not a role; the roles are {', '.join(ROLES)}")
        if policy not in POLICIES:
            raise ValueError(f"momentum[{role!r}]: {policy!r} is not a policy; write one of {', '.join(POLICIES)}")
        table[role] = policy
    return table


def state_dtype_of(group: Mapping[str, Any]) -> dict[str, str]:
    """Dtypes that ``state_dtype="auto"`` means with the table of policies of a ``group``.

    Presets, and one policy for every role, keep full momentum in float32, so that ``momentum="full"`` is AdamW or Muon.
    """
    policies = _by_role(group)
    named = policies in PRESETS.values() or len(set(policies.values())) == 1
    return dict(HALF_FACTORS if named else DEFAULT_STATE_DTYPE)


def is_full(group: Mapping[str, Any]) -> bool:
    """Whether every role of a ``group`` keeps full momentum."""
    return set(_by_role(group).values()) == {"full"}


def _by_role(group: Mapping[str, Any]) -> dict[str, str]:
    return {role: group["momentum"][role] for role in ROLES}


def _named_table(name: str) -> dict[str, str]:
    """Make the table of a preset ``name``, or of one policy for every role."""
    if name in PRESETS:
        return dict(PRESETS[name])
    if name not in POLICIES:
        raise ValueError(f"{_NO_MOMENTUM}{name!r}")
    return dict.fromkeys((*ROLES, UNMATCHED), name)


def rank_for(rank: int | float, shape: torch.Size) -> int:
    """Rank of a piece: an int itself, or a float in (0, 1] as a share of the smaller dimension, at least 1."""
    m, n = shape[-2:]
    return max(1, round(rank * min(m, n))) if isinstance(rank, float) else min(rank, n)


def momentum_for(piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
    """Momentum of a piece whose matrix has ``shape``; full where factors would not save anything."""
    # a frozen matrix may have no role; one that is trained is refused before it gets a state
    policy = piece.role if piece.role in POLICIES else group["momentum"].get(piece.role, "full")
    beta1 = float(group["betas"][0])
    if policy == "none":
        return NoMomentum(clamp=1 / (1 - beta1) if piece.role == "embedding" else 1.0)
    if policy == "low_rank" and len(shape) >= 2:
        m, n = shape[-2:]
        rank = rank_for(group["rank"], shape)
        if rank * (m + n) < m * n:
            gap = group["update_proj_gap"]
            return LowRankMomentum(
                rank,
                beta1,
                gap,
                group.get("debias", True),
                offset=_offset(piece, m * n, gap),
                storage=storage_for(LowRankMomentum.name, group["state_dtype"], torch.Size((*shape[:-1], rank))),
            )
    coded = torch.Size() if piece.role in _SMALL_ROLES else shape  # as of vectors, eight bits would save nothing
    return FullMomentum(beta1, storage_for(FullMomentum.name, group["state_dtype"], coded))


def _offset(piece: Piece, numel: int, gap: int) -> int:
    """Offset of the refreshes of a piece whose matrices have ``numel`` elements, fused or not.

    A large table of tokens has a phase to itself, because it takes as long as several blocks.
    """
    if numel >= _SMALL and piece.role in ("embedding", "lm_head"):
        return gap - 1
    phases = _PHASES_OF_SMALL if numel < _SMALL else _PHASES
    return piece.block % phases * gap // phases


def storage_for(name: str, chosen: Mapping[str, str] | str | None, shape: torch.Size) -> Storage:
    """Storage of a policy's momentum: the group's ``state_dtype`` for it, else full precision.

    ``shape`` is that of its narrowest entry for the whole matrix, so that all processes decide alike.
    """
    dtype = chosen.get(name) if isinstance(chosen, Mapping) else chosen
    if dtype == "int8":
        return eight_bits_for(shape)
    return EXACT if dtype is None else Storage(getattr(torch, dtype))


def second_moment_for(piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
    """Second moment of a piece whose matrix has ``shape``; the block rules are those of Adam-mini 1.1.1."""
    kind, beta2, eps = group["second_moment"], float(group["betas"][1]), float(group["eps"])
    if kind == "block" and piece.role != "bias":
        heads = piece.heads if piece.role in ("query", "key") else None
        return BlockSecondMoment(beta2, eps, heads, outputs=-1 if piece.transposed else -2)
    if kind == "factored" and len(shape) >= 2:
        return FactoredSecondMoment(beta2, eps)
    return ElementwiseSecondMoment(beta2, eps)
