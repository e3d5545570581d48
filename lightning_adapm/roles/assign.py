"""Parameter groups with names, roles and pieces, from the caller's arguments."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.roles.context import Named, describe, plain
from lightning_adapm.roles.find import find_role, fits, is_met, is_taught
from lightning_adapm.roles.fused import Heads, cut
from lightning_adapm.roles.identify import identify
from lightning_adapm.roles.inputs import Handed, read_group
from lightning_adapm.roles.live import is_lightning, parameters_of, unwrapped, walk
from lightning_adapm.roles.piece import ROLES, UNMATCHED, Piece, as_one_matrix
from lightning_adapm.roles.rules import FUSED, guess
from lightning_adapm.sharding.find import layout_of

HEADS = ("n_head", "n_query_groups", "head_size")
"""Head counts that a parameter group may state."""
_SAID = "said by its parameter group"


@dataclass
class Assigned:
    """Parameter groups, with the name, role and pieces of each parameter."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    """Groups with ``params`` and the parallel lists ``param_names`` and ``roles``."""
    names: dict[Tensor, str] = field(default_factory=dict)
    roles: dict[Tensor, str] = field(default_factory=dict)
    pieces: dict[Tensor, tuple[Piece, ...]] = field(default_factory=dict)
    roots: dict[int, nn.Module] = field(default_factory=dict)
    """The outermost modules that were looked into, by their ids."""
    reasons: dict[Tensor, str] = field(default_factory=dict)
    """Rules that decided the roles."""
    blocks: dict[Tensor, str | None] = field(default_factory=dict)
    """Names of the transformer blocks around the parameters; None outside."""

    def add(self, item: Named, role: str, why: str, pieces: tuple[Piece, ...]) -> None:
        """Add a parameter."""
        self.roots.update((id(root), root) for root in item.around[-1:])
        self.names[item.param], self.reasons[item.param] = item.label, why
        self.roles[item.param], self.blocks[item.param] = role, item.block_path
        self.pieces[item.param] = pieces


def assign_roles(
    groups: list[dict[str, Any]],
    known: Mapping[Tensor, str],
    first: int,
    rules: Mapping[str, str],
    unmatched: str,
    roles_matter: bool,
    check: Callable[[Named, tuple[Piece, ...], Mapping[str, Any]], None],
) -> Assigned:
    """Find the name, the role and the pieces of every parameter, without changing the arguments.

    Args:
        groups: Parameter groups of the caller, with every option.
        known: Names of the parameters that the optimizer already has.
        first: Number of the first group.
        rules: The option ``roles``.
        unmatched: The option ``unmatched``.
        roles_matter: Whether matrices are treated by role, so that an unknown one is worth a warning.
        check: Function that refuses pieces which the optimizer cannot treat, by the entries of their group.

    Raises:
        TypeError: Parameters lack names and roles, or are complex.
        ValueError: Matrices have no role (all of them are listed), or the rows of a fused weight or a head are unknown.
    """
    assigned = Assigned()
    missing: list[Named] = []
    handed = [read_group(group) for group in groups]
    policy = None if unmatched == "error" else unmatched
    for group, given, items in zip(groups, handed, _describe(handed, known, first, rules, policy), strict=True):
        stated = Heads(*(group.get(key) for key in HEADS))
        for item in items:
            role, why = _role(item, given, rules)
            role, why, pieces = _pieces(item, role, why, stated, refuse=unmatched == "error")
            if item.param.requires_grad:
                _check_trained(item, pieces)
                missing += [item] if role is None else []
            assigned.add(item, role or UNMATCHED, why, pieces)
            if not item.packed:
                check(item, pieces, group)
        lists = {
            "params": given.params,
            "param_names": [item.label for item in items],
            "roles": [assigned.roles[param] for param in given.params],
        }
        assigned.groups.append({**group, **lists})
    if assigned.names and not known:
        _warn_of_unused(rules, assigned)
    if missing and unmatched == "error":
        raise ValueError(unmatched_message((item.label, item.shape, assigned.reasons[item.param]) for item in missing))
    if missing and roles_matter:
        names = ", ".join(f"{item.label} {tuple(item.shape)}" for item in missing)
        warn_caller(f"unmatched={unmatched!r} gives {unmatched} momentum to matrices whose role is not known: {names}")
    return assigned


def _warn_of_unused(rules: Mapping[str, str], assigned: Assigned) -> None:
    """Warn of rules for names that no parameter has, in the groups or elsewhere in their models."""
    names = list(assigned.names.values())
    for root in assigned.roots.values():
        names += [f"{path}.{name}".lstrip(".") for path, around in walk(root) for name in parameters_of(around[0])]
    if unused := [pattern for pattern in rules if not is_met(pattern, names)]:
        warn_caller(
            f"roles: no parameter has a name that {', '.join(map(repr, unused))} matches, so that nothing follows from"
            f" it; names are such as {names[0]!r}"
        )


def _describe(
    handed: Sequence[Handed], known: Mapping[Tensor, str], first: int, rules: Mapping[str, str], policy: str | None
) -> list[list[Named]]:
    """Describe parameters by their place in their model.

    A module that is handed over alone is its model where it looks like one: going through all live modules costs some
    0.1 s.
    """
    if len(handed) == 1 and handed[0].module is not None and not known:
        (only,), module = handed, handed[0].module
        items = describe(((str(name), param) for name, param in zip(only.names, only.params, strict=True)), module)
        trained = [item for item in items if item.param.requires_grad]
        has_blocks = any(item.block_path is not None for item in items)
        if is_lightning(unwrapped(module)) or (has_blocks and all(_found(item, rules)[0] for item in trained)):
            return [items]
    return identify(handed, known, first, lambda item: _found(item, rules)[0] is not None, policy)


def _found(item: Named, rules: Mapping[str, str]) -> tuple[str | None, str]:
    if item.found is None:
        item.found = find_role(item, rules)
    return item.found


def _role(item: Named, given: Handed, rules: Mapping[str, str]) -> tuple[str | None, str]:
    """Role of a parameter and the reason: the group's role where it can be this parameter's, else the one found."""
    carried = given.carried.get(id(item.param))
    if given.role is None and carried is not None:
        role, why = _found(item, rules)
        return (role, why) if is_taught(why) else (carried, _SAID)
    if given.role is None:
        return _found(item, rules)
    if fits(given.role, item.shape):
        return given.role, _SAID
    # most likely the bias of these matrices, and the elementwise rules of a bias are safe for any
    return "bias", "a vector in a group of matrices"


def _pieces(
    item: Named, role: str | None, why: str, stated: Heads, refuse: bool
) -> tuple[str | None, str, tuple[Piece, ...]]:
    """Cut a parameter into pieces; without a role, and for another reason, where its rows cannot be told apart.

    Raises:
        ValueError: They cannot, and the caller wants to ``refuse`` that or has ``stated`` head counts.
    """
    try:
        cuts = cut(item, role or UNMATCHED, stated, taught=why == _SAID or is_taught(why))
    except ValueError:
        if item.param.requires_grad and (refuse or stated != Heads()):
            raise
        role, why = None, "query, key and value rows that cannot be told apart"
        cuts = cut(item, UNMATCHED)
    return role, why, tuple(replace(piece, block=item.block) for piece in cuts)


def check_heads(item: Named, pieces: tuple[Piece, ...]) -> None:
    """Check that the heads of a query or key are known, for block second moments.

    Raises:
        ValueError: The heads are unknown.
    """
    for piece in pieces:
        if piece.role not in ("query", "key") or len(item.shape) != 2:
            continue
        rows = piece.shape(item.shape)[int(piece.transposed)]
        if not piece.heads or rows % piece.heads:
            raise ValueError(
                f"second_moment='block' keeps one value per head of {item.label} {tuple(item.shape)}, but its"
                f" {rows} {piece.role} rows have {piece.heads or 'an unknown number of'} heads. Pass"
                " model.named_parameters() itself, of a model whose attention modules or config have their number of"
                " heads, or give the parameter group n_head= and n_query_groups=; second_moment='factored' needs none"
            )


def unmatched_message(missing: Iterable[tuple[str, Sequence[int], str]]) -> str:
    """Text that lists matrices without a role, given by name, shape and reason, and the argument to pass."""
    missing = list(missing)
    lines = "\n".join(f"  {name}  {tuple(shape)}" for name, shape, _ in missing)
    guessed = suggested_roles((name, why) for name, _, why in missing)
    paste = ", ".join(f'r"{pattern}": "{role}"' for pattern, role in guessed.items())
    full = 4 * sum(math.prod(shape) for _, shape, _ in missing)
    count = "1 matrix" if len(missing) == 1 else f"{len(missing)} matrices"
    return (
        f"the role of {count} is not known:\n{lines}\nState it, with the right role ({', '.join((*ROLES, *FUSED))}) or"
        ' a policy (full, low_rank, none) for each. This is a guess that saves memory where it can, and "full" where'
        f' it cannot tell:\n  roles={{{paste}}}\nor pass unmatched="full" to give all of them AdamW\'s full momentum,'
        f" {full:,} bytes in float32."
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


def _check_trained(item: Named, pieces: tuple[Piece, ...]) -> None:
    """Check that a parameter can be trained.

    Raises:
        TypeError: It is complex, or a stack of matrices that FSDP1 cuts inside them.
    """
    if item.param.is_complex():
        raise TypeError(f"{item.label} is complex; only real parameters are supported")
    check_layout(item.label, pieces[0], item.param)


def check_layout(name: str, piece: Piece, param: Tensor) -> None:
    """Check that FSDP1 does not cut a stack of matrices inside its matrices.

    Raises:
        TypeError: FSDP1 does.
    """
    layout = layout_of(param)
    if layout is not None and layout.mesh is None and len(as_one_matrix(piece.shape(layout.shape))) == 3:
        raise TypeError(
            f"{name} {tuple(layout.shape)} is a stack of matrices, which FSDP1 cuts anywhere; use FSDP2"
            " (ModelParallelStrategy), which keeps its matrices whole"
        )
