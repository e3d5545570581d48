"""From what the caller passed to parameter groups with names, roles and pieces."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_adapm.attention import Heads, cut
from lightning_adapm.optim.options import check_layout
from lightning_adapm.params import read_params
from lightning_adapm.roles import FUSED, ROLES, UNMATCHED, Named, Piece, describe, find_role, fits, link, normalize

_HOW_TO_NAME = (
    "AdaPM needs to know what each parameter is. Pass model.named_parameters(), or model.parameters() itself and not a"
    ' list made from it; in a parameter group {"params": [(name, parameter), ...]}, or a role:'
    ' {"params": [...], "role": "mlp"}'
)

_HEADS = ("n_head", "n_query_groups", "head_size")


def assign_roles(
    groups: list[dict[str, Any]], defaults: Mapping[str, Any], rules: Mapping[str, str], unmatched: str
) -> tuple[list[dict[str, Any]], dict[Tensor, tuple[Piece, ...]]]:
    """Give every parameter a role and its pieces.

    Returns:
        The groups, each with ``params`` as ``(name, parameter)`` and a parallel list ``roles``; and the pieces.

    Raises:
        TypeError: parameters without names or role, or complex ones.
        ValueError: matrices that nothing matches, all of them; a fused weight or heads that cannot be told apart.
    """
    assigned: list[dict[str, Any]] = []
    pieces: dict[Tensor, tuple[Piece, ...]] = {}
    missing: list[Named] = []
    described = [_describe(group, index) for index, group in enumerate(groups)]
    if len(described) > 1:  # a fused weight and the output projection beside it may be in different groups
        link(item for items in described for item in items)
    for group, items in zip(groups, described, strict=True):
        options = {key: value for key, value in group.items() if key not in ("role", *_HEADS)}
        found = [_role(item, group.get("role"), rules) for item in items]
        stated = Heads(*(group.get(key) for key in _HEADS))
        for item, role in zip(items, found, strict=True):
            if item.param.is_complex():
                raise TypeError(f"{item.name} is complex; AdaPM supports real parameters only")
            if role is None and item.param.requires_grad:
                missing.append(item)
            cuts = cut(item, role or UNMATCHED, stated)
            pieces[item.param] = tuple(replace(piece, block=item.block) for piece in cuts)
            check_layout(item.name, cuts[0], item.param)
            if (options.get("second_moment") or defaults["second_moment"]) == "block":
                _check_heads(item, pieces[item.param])
        options["params"] = [(item.name, item.param) for item in items]
        options["roles"] = [role or UNMATCHED for role in found]
        assigned.append(options)
    if missing and unmatched == "error":
        raise ValueError(_unmatched_message(missing))
    if missing:
        names = ", ".join(f"{item.name} {tuple(item.shape)}" for item in missing)
        warnings.warn(
            f"AdaPM gives {unmatched} momentum to matrices whose role it does not know: {names}", stacklevel=4
        )
    return assigned, pieces


def _describe(group: Mapping[str, Any], index: int) -> list[Named]:
    items, module = read_params(group["params"])
    role = group.get("role")
    named: list[Any] = []
    for position, item in enumerate(items):
        if not isinstance(item, Tensor):
            named.append(item)
        elif role is None:
            raise TypeError(f"params holds a tensor of shape {tuple(item.shape)} without a name. {_HOW_TO_NAME}")
        else:
            named.append((f"group{index}.{role}.{position}", item))
    for item in named:
        if not (
            isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)
        ):
            raise TypeError(f"params holds {item!r}. {_HOW_TO_NAME}")
    return describe(named, module)


def _role(item: Named, stated: str | None, rules: Mapping[str, str]) -> str | None:
    """The role that the group states, where it can be this parameter's; else the one that is found."""
    if stated is not None and fits(stated, item.shape):
        return stated
    # a vector in a group of matrices: most likely their bias, and the elementwise rules of a bias are safe for any
    return find_role(item, rules)[0] if stated is None else "bias"


def _check_heads(item: Named, pieces: tuple[Piece, ...]) -> None:
    for piece in pieces:
        if piece.role not in ("query", "key") or len(item.shape) != 2:
            continue
        rows = piece.shape(item.shape)[int(piece.transposed)]
        if not piece.heads or rows % piece.heads:
            raise ValueError(
                f"second_moment='block' keeps one value per head of {item.name} {tuple(item.shape)}, but its"
                f" {rows} {piece.role} rows have {piece.heads or 'an unknown number of'} heads. Pass"
                " model.named_parameters() itself, of a model whose attention modules or config say their number of"
                " heads, or give the parameter group n_head= and n_query_groups="
            )


def _unmatched_message(missing: list[Named]) -> str:
    lines = "\n".join(f"  {item.name}  {tuple(item.shape)}" for item in missing)
    patterns = dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(normalize(item.name))) for item in missing)
    paste = ", ".join(f'r"^{pattern}$": "full"' for pattern in patterns)
    return (
        f"AdaPM does not know the role of {len(missing)} matrices:\n{lines}\nTeach it, with the right role"
        f" ({', '.join((*ROLES, *FUSED))}) or a policy (full, low_rank, none) for each:\n  roles={{{paste}}}\n"
        'or pass unmatched="full" to give all of them AdamW\'s full momentum.'
    )
