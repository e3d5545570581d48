"""Validation of options and parameters, with errors that show what to write instead."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Number
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.policy import SECOND_MOMENTS, momentum_table
from lightning_adapm.roles.assign import HEADS, check_layout
from lightning_adapm.roles.piece import POLICIES, ROLES, UNMATCHED, Piece
from lightning_adapm.roles.rules import FUSED
from lightning_adapm.step.rounding import ROUNDINGS

StateDtype = Mapping[str, str] | torch.dtype | str | None
"""A dtype, its name, or names of dtypes by policy."""
AUTO = "auto"
"""Value of an option that follows from others."""
Automatic = Mapping[str, Callable[[Mapping[str, Any]], Any]]
"""Options that may be :data:`AUTO`, each with a function that derives it from the other options of a group."""

STATE_DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Dtypes of the momentum: those that torch can compute with, and codes of :mod:`lightning_adapm.moments.quantized`."""

BASES = ("auto", "replicate", "shard")
"""Placements of the bases of sharded matrices."""


def check(group: Mapping[str, Any]) -> None:
    """Check the options of one parameter group, defaults filled in.

    Raises:
        ValueError: An option is out of range.
    """
    for option, (wanted, holds) in _RANGES.items():
        if option in group:
            check_option(group, option, wanted, holds)
    for option in HEADS:
        if group.get(option) is not None:
            check_option(group, option, *COUNT)
    for role in group["no_decay"]:
        if role not in ROLES:
            raise ValueError(f"no_decay: {role!r} is not a role; the roles are {', '.join(ROLES)}")
    if group.get("role") is not None and group["role"] not in (*ROLES, *FUSED, *POLICIES):
        raise ValueError(_no_role("role", group["role"]))


def plain(group: Mapping[str, Any], defaults: Mapping[str, Any], unmatched: str) -> dict[str, Any]:
    """Normalize the options of a parameter group to the plain values that checkpoints hold.

    Args:
        group: The parameter group, or the defaults themselves. Keys that are not among ``defaults`` are the caller's.
        defaults: The optimizer's options. A group's policies by role differ from theirs in what the group states.
        unmatched: As for the optimizer.

    Raises:
        ValueError: A role, policy or dtype does not exist.
    """
    found = dict(group)
    for option in group.keys() & defaults.keys():
        value = group[option]
        if option == "momentum":
            own = isinstance(value, Mapping | None)
            value = momentum_table({**defaults[option], **(value or {})} if own else value, unmatched)
        elif option == "state_dtype":
            value = dtype_names(value)
        elif option == "no_decay":
            value = [value] if isinstance(value, str) else value or ()
            if not isinstance(value, Iterable):
                raise ValueError(f"no_decay must be a list of roles, but got {value!r}")
            value = list(value)
        elif option == "betas" and isinstance(value, Iterable) and not isinstance(value, str):
            value = (list if isinstance(value, list) else tuple)(map(_plain, value))
        else:
            value = _plain(value)
        found[option] = value
    return found


def are_automatic(group: Mapping[str, Any], known: Iterable[str]) -> set[str]:
    """Select those of the ``known`` options that a group sets to ``"auto"``."""
    return {option for option in known if isinstance(group.get(option), str) and group[option] == AUTO}


def _plain(value: Any) -> Any:
    """Convert a NumPy number, which ``torch.load`` refuses by default, to Python's; return other values unchanged."""
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value


def options_of(optimizer: Callable[..., Any]) -> list[str]:
    """Names of the parameters of an optimizer's constructor, without the one that collects other keywords."""
    found = inspect.signature(optimizer).parameters.values()
    return [parameter.name for parameter in found if parameter.kind is not parameter.VAR_KEYWORD]


def instead_of(name: str, known: Iterable[str], what: str = "options") -> str:
    """Suggest a name instead of one that does not exist: the nearest one in whatever case, or all of them."""
    known = list(known)
    by_lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f"did you mean {by_lower[close[0]]!r}?" if close else f"the {what} are {', '.join(known)}"


def advice(value: Any) -> str:
    """Advice to append to an error about a ``value`` that is text where a number is wanted."""
    try:
        float(value if isinstance(value, str) else "no")
    except ValueError:
        return ""
    return ", which is text: write a number (YAML reads 1e-3 as text, and 1.0e-3 as a number)"


def _is_count(value: Any) -> bool:
    return type(value) is not bool and isinstance(value, Integral) and int(value) >= 1


def _is_amount(value: Any) -> bool:
    return not isinstance(value, str | bool) and 0 <= float(value) < math.inf


def _is_switch(value: Any) -> bool:
    return not isinstance(value, str) and value in (True, False)


def _is_rank(rank: Any) -> bool:
    if isinstance(rank, float):
        return 0 < rank <= 1
    return _is_count(rank)


AMOUNT = ("a finite number >= 0", _is_amount)
COUNT = ("an int >= 1", _is_count)
SWITCH = ("True or False", _is_switch)
_RANGES: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "lr": AMOUNT,
    "betas": ("two numbers in [0, 1)", lambda betas: len(betas) == 2 and all(0 <= b < 1 for b in betas)),
    "eps": AMOUNT,
    "weight_decay": AMOUNT,
    "rank": ("an int >= 1, or a float in (0, 1] for a share of the smaller dimension", _is_rank),
    "update_proj_gap": COUNT,
    "second_moment": (f"one of {', '.join(SECOND_MOMENTS)}", lambda kind: kind in SECOND_MOMENTS),
    "basis": (f"one of {', '.join(BASES)}", lambda basis: basis in BASES),
    "rounding": (f"one of {', '.join(ROUNDINGS)}", lambda rounding: rounding in ROUNDINGS),
    "clip_threshold": ("a number > 0, or None for no bound", lambda clip: clip is None or clip > 0),
    "debias": SWITCH,
    "maximize": SWITCH,
    "nesterov": SWITCH,
    "convolutions": SWITCH,
}
"""Options with their condition, in words and as a test."""

FOREIGN = frozenset({*_RANGES, "momentum", "state_dtype", "mu", "ns_steps", "newton_schulz"})
"""Options that at least one optimizer of the package has."""


def check_option(group: Mapping[str, Any], option: str, wanted: str, holds: Callable[[Any], Any]) -> None:
    """Check one option of a parameter group.

    Args:
        group: The parameter group.
        option: Name of the option.
        wanted: Condition on the value, in words.
        holds: The same condition as a test.

    Raises:
        ValueError: The test fails.
    """
    value = group[option]
    try:
        fine = bool(holds(value))
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{option} must be {wanted}, but got {value!r}{advice(value)}")


def check_roles(roles: Mapping[str, str] | None, unmatched: str) -> None:
    """Check the two options that are resolved at construction.

    Raises:
        ValueError: A role or policy is unknown, or a name is no regular expression.
    """
    if not isinstance(roles, Mapping | None):
        raise ValueError(f"roles must be {{regular expression on names: role or policy}}, but got {roles!r}")
    for pattern, role in (roles or {}).items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"roles: {pattern!r} is not a regular expression ({error})") from None
        if role not in (*ROLES, *FUSED, *POLICIES):
            raise ValueError(_no_role(f"roles[{pattern!r}]", role))
    if unmatched not in ("error", *POLICIES):
        raise ValueError(f"unmatched must be 'error' or one of {', '.join(POLICIES)}, but got {unmatched!r}")


def _no_role(option: str, found: Any) -> str:
    roles = ", ".join((*ROLES, *FUSED))
    return f"{option}: {found!r} is neither a role ({roles}) nor a policy ({', '.join(POLICIES)}); write one of them"


def dtype_names(dtype: StateDtype) -> str | dict[str, str] | None:
    """Convert ``state_dtype`` to plain strings, as in checkpoints.

    Raises:
        ValueError: A dtype is not supported, or a key is no policy.
    """
    if not isinstance(dtype, Mapping):
        return dtype_name(dtype)
    for policy in dtype:
        if policy not in ("low_rank", "full"):
            raise ValueError(f"state_dtype: {policy!r} is not a policy with a state; write 'low_rank' or 'full'")
    return {policy: name for policy, each in dtype.items() if (name := dtype_name(each))}


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    """Convert one dtype to a plain string, as in checkpoints.

    Raises:
        ValueError: The dtype is not supported.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is None:
        return None
    if found not in STATE_DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in STATE_DTYPES)
        raise ValueError(f"state_dtype must be one of {names}, but got {dtype!r}")
    return str(found).removeprefix("torch.")


def check_held(optimizer: str, group: Mapping[str, Any], pieces: Mapping[Tensor, Any]) -> None:
    """Refuse a group whose parameters were replaced after the optimizer was built, as DeepSpeed's ZeRO does.

    Raises:
        TypeError: A parameter was replaced.
    """
    for index, param in enumerate(group["params"]):
        if param not in pieces:
            raise TypeError(
                f"params[{index}] of shape {tuple(param.shape)} was put into a parameter group of {optimizer} after the"
                " optimizer was built, so that its role is unknown. DeepSpeed replaces parameters like this and is not"
                " supported; add parameters with add_param_group"
            )


def check_trainable(optimizer: str, name: str, piece: Piece, param: Tensor, unmatched: str) -> None:
    """Refuse a parameter that was unfrozen without a role, or that nothing here can train.

    Raises:
        ValueError: A matrix has no role.
        TypeError: A parameter is complex, or its device or strategy is not supported.
    """
    if piece.role == UNMATCHED and unmatched == "error":
        raise ValueError(
            f"{name} {tuple(param.shape)} now requires a gradient, but {optimizer} found no role for it when it was"
            f" frozen; pass roles={{{name!r}: ...}} with its role or a policy, or unmatched='full'"
        )
    if param.device.type == "xla":
        raise TypeError(f"{optimizer} does not support XLA devices (TPUs) yet; train on a CPU or a GPU")
    if param.device.type == "mps":
        raise TypeError(f"{optimizer} does not support MPS devices, which have no float64; train on a CPU or a GPU")
    if param.is_complex():
        raise TypeError(f"{name} is complex and now requires a gradient; {optimizer} supports real parameters only")
    check_layout(name, piece, param)


def check_gradient(optimizer: str, name: str, grad: Tensor) -> None:
    """Refuse unsupported gradients.

    Raises:
        RuntimeError: The gradient is sparse; ``torch.optim.AdamW`` raises the same.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{optimizer} does not support sparse gradients, and {name} has one; build its module with sparse=False"
        )
