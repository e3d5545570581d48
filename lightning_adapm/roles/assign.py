"""From what the caller passed to parameter groups with names, roles and pieces."""

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_adapm.roles.context import Named, describe, link, plain
from lightning_adapm.roles.find import find_role, fits
from lightning_adapm.roles.fused import Heads, cut
from lightning_adapm.roles.inputs import read_params
from lightning_adapm.roles.piece import ROLES, UNMATCHED, Piece
from lightning_adapm.roles.rules import FUSED, guess
from lightning_adapm.sharding.find import layout_of

_HOW_TO_NAME = (
    "AdaPM needs to know what each parameter is. Pass model.named_parameters(), or model.parameters() itself and not a"
    ' list made from it; in a parameter group {"params": [(name, parameter), ...]}, or a role:'
    ' {"params": [...], "role": "mlp"}'
)

_HEADS = ("n_head", "n_query_groups", "head_size")


def assign_roles(
    groups: list[dict[str, Any]],
    rules: Mapping[str, str],
    unmatched: str,
    roles_matter: bool,
    check: Callable[[Named, tuple[Piece, ...], Mapping[str, Any]], None],
) -> tuple[list[dict[str, Any]], dict[Tensor, tuple[Piece, ...]], dict[Tensor, str]]:
    """Give every parameter a role and its pieces.

    Args:
        groups: Parameter groups as the caller passed them.
        defaults: Options of groups that do not have their own.
        rules: The option ``roles``.
        unmatched: The option of that name.
        roles_matter: Matrices are treated by their role, so that one that is not found is worth a warning.
        check: Refuses pieces of a parameter that the optimizer cannot treat, from the entries of its group.

    Returns:
        The groups, each with ``params`` as ``(name, parameter)`` and a parallel list ``roles``; the pieces; and of each
        parameter the rule that decided.

    Raises:
        TypeError: parameters without names or role, or complex ones.
        ValueError: no parameters; matrices that nothing matches, all of them; a fused weight or heads that cannot be
            told apart.
    """
    assigned: list[dict[str, Any]] = []
    pieces: dict[Tensor, tuple[Piece, ...]] = {}
    reasons: dict[Tensor, str] = {}
    missing: list[Named] = []
    described = [_describe(group, index) for index, group in enumerate(groups)]
    if not any(described):
        raise ValueError("optimizer got an empty parameter list")  # torch's words
    if len(described) > 1:  # a fused weight and the output projection beside it may be in different groups
        link(item for items in described for item in items)
    for group, items in zip(groups, described, strict=True):
        options = {key: value for key, value in group.items() if key not in ("role", *_HEADS)}
        roles = []
        stated = Heads(*(group.get(key) for key in _HEADS))
        for item in items:
            if item.param.is_complex() and item.param.requires_grad:
                raise TypeError(f"{item.name} is complex; AdaPM supports real parameters only")
            role, reasons[item.param] = _role(item, group.get("role"), rules)
            try:
                cuts = cut(item, role or UNMATCHED, stated)
            except ValueError:
                if item.param.requires_grad and (unmatched == "error" or stated != Heads()):
                    raise
                role, reasons[item.param] = None, "query, key and value rows that cannot be told apart"
                cuts = cut(item, UNMATCHED)
            if role is None and item.param.requires_grad:
                missing.append(item)
            roles.append(role or UNMATCHED)
            pieces[item.param] = tuple(replace(piece, block=item.block) for piece in cuts)
            check_layout(item.name, cuts[0], item.param)
            if not item.packed:
                check(item, pieces[item.param], group)
        options["params"] = [(item.name, item.param) for item in items]
        options["roles"] = roles
        assigned.append(options)
    if missing and unmatched == "error":
        raise ValueError(unmatched_message((item.name, item.shape, reasons[item.param]) for item in missing))
    if missing and roles_matter:
        names = ", ".join(f"{item.name} {tuple(item.shape)}" for item in missing)
        warnings.warn(
            f"AdaPM gives {unmatched} momentum to matrices whose role it does not know: {names}", stacklevel=5
        )
    return assigned, pieces, reasons


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


def _role(item: Named, stated: str | None, rules: Mapping[str, str]) -> tuple[str | None, str]:
    """The role that the group states, where it can be this parameter's; else the one that is found. And why."""
    if stated is None:
        return find_role(item, rules)
    if fits(stated, item.shape):
        return stated, "said by its parameter group"
    # most likely the bias of these matrices, and the elementwise rules of a bias are safe for any
    return "bias", "a vector in a group of matrices"


def check_heads(item: Named, pieces: tuple[Piece, ...]) -> None:
    """Refuse block second moments where it is not known which rows are a head's.

    Raises:
        ValueError: naming the parameter, and how to say its heads.
    """
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


def unmatched_message(missing: Iterable[tuple[str, Sequence[int], str]]) -> str:
    """What to write for matrices, given by name, shape and reason, whose role is not found."""
    missing = list(missing)
    lines = "\n".join(f"  {name}  {tuple(shape)}" for name, shape, _ in missing)
    guessed = suggested_roles((name, why) for name, _, why in missing)
    paste = ", ".join(f'r"{pattern}": "{role}"' for pattern, role in guessed.items())
    full = 4 * sum(math.prod(shape) for _, shape, _ in missing)
    return (
        f"AdaPM does not know the role of {len(missing)} matrices:\n{lines}\nTeach it, with the right role"
        f" ({', '.join((*ROLES, *FUSED))}) or a policy (full, low_rank, none) for each. This is a guess that saves"
        f' memory where it can, and "full" where it cannot tell:\n  roles={{{paste}}}\nor pass unmatched="full" to'
        f" give all of them AdamW's full momentum, {full:,} bytes in float32."
    )


def suggested_roles(missing: Iterable[tuple[str, str]]) -> dict[str, str]:
    """``roles`` to suggest for matrices, given by name and the reason why they have none.

    Names that differ in their numbers share a regular expression; where guesses about them differ, it is ``"full"``.
    """
    roles: dict[str, str] = {}
    for name, why in missing:
        pattern, role = "^" + re.sub(r"\d+", r"\\d+", re.escape(plain(name))) + "$", guess(plain(name), why)
        roles[pattern] = role if roles.get(pattern, role) == role else "full"
    return roles


def check_layout(name: str, piece: Piece, param: Tensor) -> None:
    """Refuse what FSDP1 makes of a stack of matrices.

    Raises:
        TypeError: it is cut inside its matrices.
    """
    layout = layout_of(param)
    if layout is not None and layout.mesh is None and len(piece.shape(layout.shape)) == 3:
        raise TypeError(
            f"{name} {tuple(layout.shape)} is a stack of matrices, which FSDP1 cuts anywhere; use FSDP2"
            " (ModelParallelStrategy), which keeps its matrices whole"
        )
