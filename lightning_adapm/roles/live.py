"""The live modules that hold given tensors, found by the tensors' identity.

Callers hand over bare tensors, parts of models, or equal names from two models; the modules above a tensor identify
it. A module has no reference to what holds it, so all live ones are searched, once per call. Only the tables of
``torch.nn.Module`` are read: a module may lack them, or have a ``named_parameters`` or properties of its own that fail.
"""

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_WRAPPED = {
    "_forward_module",
    "_original_module",
    "_orig_mod",
    "module",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
"""Names under which Fabric, ``torch.compile``, DDP, FSDP1 and activation checkpointing hold their module."""


def children_of(module: nn.Module) -> dict[str, nn.Module]:
    """Submodules by name."""
    return {name: child for name, child in _table(module, "_modules").items() if is_module(child)}


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameters by name."""
    return {name: param for name, param in _table(module, "_parameters").items() if param is not None}


def is_module(thing: object) -> bool:
    """Whether something is a module, by its type: lazy objects may import or compute when they are inspected."""
    return issubclass(type(thing), nn.Module)


def attribute(thing: object, name: str) -> Any:
    """Read an attribute of a module or its configuration; None where it is missing or fails."""
    try:
        return getattr(thing, name, None)
    except Exception:  # a property of the user's that fails
        return None


def is_lightning(module: nn.Module) -> bool:
    """Whether a module is a LightningModule of either package, without importing them."""
    return any(base.__name__ == "LightningModule" for base in type(module).__mro__)


def walk(root: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """Yield every module inside ``root`` by its path, with those around it from the inside out."""
    stack: list[tuple[str, tuple[nn.Module, ...]]] = [("", (root,))]
    while stack:
        path, around = stack.pop()
        yield path, around
        for name, child in reversed(children_of(around[0]).items()):
            if all(child is not module for module in around):  # a module may hold one that it lies in
                stack.append((f"{path}.{name}" if path else name, (child, *around)))


def find_roots(tensors: Iterable[Tensor]) -> list[nn.Module]:
    """Find the fewest outermost modules that hold ``tensors``; those that hold most come first.

    A LightningModule goes before a module around it, and of several that hold the same tensors, the one that is being
    trained, then the smallest. Wrappers are not counted as outermost.
    """
    wanted = {id(tensor) for tensor in tensors}
    if not wanted:  # as when an optimizer is begun without parameters
        return []
    held, above, outermost = _holders(wanted)
    lightning = [module for module in above if is_lightning(module)]
    inside = {id(inner) for module in lightning for inner in _inside(module) if inner is not module}
    candidates = [*outermost, *(module for module in lightning if id(module) not in inside)]
    roots: list[nn.Module] = []
    for modules in (candidates, above):  # all of them where modules hold each other, so that none is outermost
        if held:
            for best in sorted((_Candidate(module, held) for module in modules), key=_Candidate.rank):
                if best.held & held:
                    roots.append(unwrapped(best.module))
                    held -= best.held
    return roots


def unwrapped(module: nn.Module) -> nn.Module:
    """Remove wrappers that hold nothing else around the user's module."""
    while (children := children_of(module)) and children.keys() <= _WRAPPED and not parameters_of(module):
        module = next(iter(children.values()))
    return module


class _Candidate:
    def __init__(self, module: nn.Module, wanted: set[int]) -> None:
        inside = list(_inside(module))
        self.module, self.size = module, len(inside)
        self.held = {id(p) for each in inside for p in parameters_of(each).values() if id(p) in wanted}
        self.trained = is_lightning(module) and object.__getattribute__(module, "__dict__").get("_trainer") is not None

    def rank(self) -> tuple[Any, ...]:
        return -len(self.held), not is_lightning(self.module), not self.trained, self.size


def _holders(wanted: set[int]) -> tuple[set[int], list[nn.Module], list[nn.Module]]:
    """Return the held tensors, all modules that hold some at any depth, and the outermost of these modules."""
    held: set[int] = set()
    parents: dict[int, list[nn.Module]] = {}
    above: dict[int, nn.Module] = {}
    for module in [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]:
        for child in _table(module, "_modules").values():
            parents.setdefault(id(child), []).append(module)
        if own := wanted.intersection(map(id, _table(module, "_parameters").values())):
            above[id(module)] = module
            held |= own
    reached = list(above.values())
    while reached:
        around = {id(parent): parent for module in reached for parent in parents.get(id(module), ())}
        reached = [module for key, module in around.items() if key not in above]
        above |= around
    return held, list(above.values()), [module for key, module in above.items() if key not in parents]


def _inside(root: nn.Module) -> Iterator[nn.Module]:
    """``root`` and every module inside it, each once."""
    seen: dict[int, nn.Module] = {id(root): root}
    stack = [root]
    while stack:
        module = stack.pop()
        yield module
        for child in children_of(module).values():
            if id(child) not in seen:
                seen[id(child)] = child
                stack.append(child)


def _table(module: nn.Module, name: str) -> Mapping[str, Any]:
    table = object.__getattribute__(module, "__dict__").get(name)
    return table if isinstance(table, dict) else {}
