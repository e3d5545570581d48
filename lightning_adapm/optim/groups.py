"""Options of parameter groups: checking, comparing and joining them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_adapm.optim import options
from lightning_adapm.roles.callers import warn_caller

_LEFT_OVER = ("amsgrad", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
"""Keywords of ``torch.optim.AdamW`` without a meaning here."""
_OF_ALL = ("roles", "unmatched", "update_in_backward")
"""Options of the whole optimizer, not of a group. Groups of built optimizers have a list under ``roles``, though."""
_CHANGE_RESULTS = ("amsgrad", "differentiable")
"""Keywords of ``torch.optim.AdamW`` that change the result of a step."""
_NOT_SHOWN = ("params", "param_names", "as_built", "format_version")
"""Entries with a value for each parameter, or for checkpoints alone."""


def as_text(optimizer: str, groups: Iterable[Mapping[str, Any]]) -> str:
    """Text of an optimizer as in ``torch.optim``, but with numbers of parameters by role instead of a list."""
    lines = [f"{optimizer} ("]
    for index, group in enumerate(groups):
        shown = {key: value for key, value in group.items() if key not in _NOT_SHOWN}
        shown["roles"] = ", ".join(f"{count} {role}" for role, count in Counter(group.get("roles", ())).items())
        lines += [f"Parameter Group {index}", *(f"    {key}: {shown[key]}" for key in sorted(shown))]
    return "\n".join([*lines, ")"])


def check_stated(optimizer: str, group: Mapping[str, Any]) -> None:
    """Refuse entries of a parameter group that belong to another optimizer or to the whole optimizer.

    Raises:
        ValueError: An option of ``torch.optim.AdamW`` would change the result, or an option is not a group's.
    """
    _refuse_counterparts(optimizer, group)
    for key in _OF_ALL:
        if key in group and (key != "roles" or isinstance(group[key], Mapping)):
            raise ValueError(
                f"{key}={group[key]!r} in a parameter group: {key} is an option of all groups; pass it to the"
                " optimizer, or write the group's role"
            )


def settings_of(group: Mapping[str, Any], keys: Iterable[str]) -> tuple[Any, ...]:
    """Copy of a group's options, for comparisons after the group has changed."""
    return tuple(_frozen(group.get(key)) for key in keys)


def joined(
    selected: Iterable[tuple[int, list[Tensor]]], groups: Sequence[Mapping[str, Any]], defaults: Iterable[str]
) -> list[tuple[int, list[Tensor]]]:
    """Join parameters of groups with equal options, so that they step together.

    Args:
        selected: Indices of groups, each with parameters of it.
        groups: All parameter groups.
        defaults: Names of the options.

    Returns:
        Their parameters, under the index of the first of the groups that were joined.
    """
    found: dict[Any, tuple[int, list[Tensor]]] = {}
    for index, params in selected:
        found.setdefault(settings_of(groups[index], defaults), (index, []))[1].extend(params)
    return list(found.values())


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return tuple(value.items())
    return (id(value), value) if isinstance(value, Tensor) else value


def check_left_over(optimizer: type, given: Mapping[str, Any]) -> None:
    """Warn of keywords of ``torch.optim.AdamW`` that change no result, unless they turn nothing on; refuse all others.

    Raises:
        ValueError: A keyword would change the result.
        TypeError: A keyword is unknown. The error names the nearest option of ``optimizer``.
    """
    name = optimizer.__name__
    for key in given:
        if key not in _LEFT_OVER and key != "format_version":  # in the defaults that an optimizer is rebuilt from
            raise TypeError(f"{name} has no option {key!r}; {options.instead_of(key, options.options_of(optimizer))}")
    _refuse_counterparts(name, given)
    asked = {key: value for key, value in given.items() if bool(value) != (key == "decoupled_weight_decay")}
    if ignored := [f"{key}={value!r}" for key, value in asked.items() if key in _LEFT_OVER]:
        warn_caller(f"{name} ignores {', '.join(ignored)}: options of torch.optim without a meaning here")


def _refuse_counterparts(optimizer: str, given: Mapping[str, Any]) -> None:
    for key in _CHANGE_RESULTS:
        if given.get(key):
            raise ValueError(f"{optimizer} has no counterpart of {key}={given[key]!r}; leave it out")
