"""Names and tensors from the argument ``params`` of an optimizer."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.roles.piece import POLICIES, ROLES
from lightning_adapm.roles.rules import FUSED
from lightning_adapm.sharding.fsdp1 import names_parameters

HOW_TO_NAME = (
    "Each parameter needs a name or a role. Pass model.named_parameters(), model.parameters(), or tensors of a model"
    ' that exists while the optimizer is built; in a parameter group {"params": [(name, parameter), ...]}, or a role:'
    ' {"params": [...], "role": "mlp"}; or unmatched="full", which gives what has no name AdamW\'s full momentum'
)


@dataclass
class Handed:
    """Parameters of one group, as the caller gave them."""

    params: list[Tensor]
    names: list[str | None]
    module: nn.Module | None = None
    """Module whose ``parameters()`` or ``named_parameters()`` they are; None where unknown."""
    implied: bool = False
    """Whether the names are the module's, not the caller's."""
    role: str | None = None
    """Role that the group states for all of them."""
    carried: dict[int, str] = field(default_factory=dict)
    """Roles in a group of an optimizer of the package, by the parameter's identity."""


def source_module(params: Any) -> nn.Module | None:
    """Find the module whose ``parameters()`` or ``named_parameters()`` is this unstarted generator; None otherwise.

    LightningCLI and litgpt pass nothing but ``model.parameters()`` to an optimizer. A generator that has not run still
    has its arguments. Its module, and with it every name and head count, can therefore be read exactly.
    """
    if not inspect.isgenerator(params):
        return None
    if params.gi_code is not nn.Module.parameters.__code__ and not _has_names(params):
        return None
    if inspect.getgeneratorstate(params) != inspect.GEN_CREATED:
        return None
    module: nn.Module = _arguments(params)["self"]
    return module


def _has_names(generator: Any) -> bool:
    """Whether a generator is some module's ``named_parameters()``; FSDP1 has a method of its own."""
    return generator.gi_code is nn.Module.named_parameters.__code__ or names_parameters(generator.gi_code)


def _arguments(generator: Any) -> dict[str, Any]:
    return dict(generator.gi_frame.f_locals)


def read_groups(params: Any) -> list[dict[str, Any]]:
    """Make parameter groups as ``torch.optim`` does, one if ``params`` is not a list of groups.

    Raises:
        TypeError: ``params`` has a type that ``torch.optim`` does not accept, either.
        ValueError: ``params`` is empty.
    """
    _check_kind(params)
    if isinstance(params, Tensor):
        raise TypeError("params is one tensor, but must be an iterable of tensors or parameter groups: pass [tensor]")
    module = source_module(params)
    items = list(params if module is None else module.parameters(_arguments(params).get("recurse", True)))
    if not items:
        raise ValueError("optimizer got an empty parameter list")
    if not isinstance(items[0], dict):
        return [{"params": items if module is None else params}]
    for item in items:
        if not isinstance(item, dict):
            raise TypeError(f"params mixes parameter groups with {type(item).__name__}: put that into a group too")
    return items


def read_group(group: Mapping[str, Any]) -> Handed:
    """Read the parameters of one group, each once.

    Raises:
        TypeError: The group has a set, a module, or something that is neither a tensor nor a name with a tensor.
    """
    params, module, implied = group["params"], None, False
    if isinstance(params, Tensor):
        params = [params]
    else:
        _check_kind(params)
        module = source_module(params)
        if module is not None and not _has_names(params):
            params, implied = module.named_parameters(recurse=_arguments(params)["recurse"]), True
    items = list(params)
    names, roles = (_parallel(group.get(key), items) for key in ("param_names", "roles"))
    named: dict[int, tuple[str | None, Tensor]] = {}
    carried: dict[int, str] = {}
    for item, name, role in zip(items, names, roles, strict=True):
        name, param = (name, item) if isinstance(item, Tensor) else _named(item)
        named.setdefault(id(param), (name, param))
        if role in (*ROLES, *FUSED, *POLICIES):
            carried[id(param)] = role
    if len(named) < len(items):
        warn_caller(
            f"a parameter group has duplicate parameters, {len(items) - len(named)} of them; each is trained once"
        )
    handed = [param for _, param in named.values()], [name for name, _ in named.values()]
    return Handed(*handed, module, implied, group.get("role"), carried)


def _check_kind(params: Any) -> None:
    if isinstance(params, nn.Module):
        raise TypeError("params is a module: pass its named_parameters() instead")
    if isinstance(params, (set, frozenset)):
        raise TypeError("params is a set, whose order changes from run to run: pass a list")
    if isinstance(params, Mapping):
        raise TypeError("params is a dict: pass its items(), or a list of parameter groups [{'params': ...}]")
    if not isinstance(params, Iterable):
        raise TypeError(f"params must be an iterable of parameters or of parameter groups, but got {type(params)}")


def _named(item: Any) -> tuple[str, Tensor]:
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)):
        raise TypeError(f"params holds {item!r}. {HOW_TO_NAME}")
    return item


def _parallel(entry: Any, items: list[Any]) -> list[Any]:
    """Read an entry of a group with one value per parameter; None for each parameter otherwise."""
    fits = isinstance(entry, (list, tuple)) and len(entry) == len(items)
    return list(entry) if fits else [None] * len(items)
