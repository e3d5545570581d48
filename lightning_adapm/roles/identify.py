"""Identification of every parameter in its model by the tensor itself, whatever names the caller gave."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, count
from typing import NamedTuple

from torch import Tensor, nn

from lightning_adapm.roles.context import Named, describe_whole, link, normalize
from lightning_adapm.roles.inputs import HOW_TO_NAME, Handed
from lightning_adapm.roles.live import children_of, find_roots, unwrapped


class Placed(NamedTuple):
    """A parameter in a live module, by its names and the modules around it."""

    item: Named
    names: list[str]
    """All names in the module; a tied weight has several."""
    root: nn.Module

    def is_called(self, name: str) -> bool:
        """Whether a name is the parameter's own in its model, or in a part of the model."""
        wanted = normalize(name)
        return any(f".{normalize(own)}".endswith(f".{wanted}") for own in self.names)

    def is_inside(self, name: str) -> bool:
        """Whether a name is the parameter's own with a prefix, as for one of two models."""
        given = normalize(name)
        return bool(children_of(self.root)) and any(given.endswith(f".{normalize(own)}") for own in self.names)


def identify(
    handed: Sequence[Handed],
    known: Mapping[Tensor, str],
    first: int,
    has_role: Callable[[Named], bool],
    policy: str | None,
) -> list[list[Named]]:
    """Describe parameters by the outermost modules that hold them, or else by their names.

    Args:
        handed: Parameters of each group.
        known: Names of the parameters that the optimizer already has, which belong to the same model.
        first: Number of the first group.
        has_role: Whether a parameter's place in its model determines its role. The caller's name decides otherwise.
        policy: Policy of parameters without a name or role; None refuses them.

    Raises:
        TypeError: Neither a live module nor the caller identifies a parameter.
        ValueError: Parameters that differ only in their names have the same name.
    """
    tensors = [*known, *(param for group in handed for param in group.params)]
    placed = _place(tensors)
    by_name = [_by_name(name, param, placed) for param, name in known.items() if not _is_called(name, param, placed)]
    described: list[list[Named]] = []
    for index, group in enumerate(handed, first):
        items: list[Named] = []
        for position, (name, param) in enumerate(zip(group.names, group.params, strict=True)):
            place = placed.get(id(param))
            if place is not None:
                part = group.implied and group.module is not None and place.root is not unwrapped(group.module)
                place.item.label = place.item.name if name is None or part else name
                if name is None or group.module is not None or place.is_called(name) or has_role(place.item):
                    items.append(place.item)
                    continue
            items.append(_by_name(name or _made_up(group, index, position, policy), param, placed))
            by_name.append(items[-1])
        described.append(items)
    link(by_name)
    _make_labels_unique((item for items in described for item in items), placed, known)
    return described


def _place(tensors: Collection[Tensor]) -> dict[int, Placed]:
    wanted = {id(tensor) for tensor in tensors}
    placed: dict[int, Placed] = {}
    for root in find_roots(tensors):
        for key, (item, names) in describe_whole(root, wanted).items():
            placed.setdefault(key, Placed(item, names, root))
    return placed


def _is_called(name: str, param: Tensor, placed: Mapping[int, Placed]) -> bool:
    return id(param) in placed and placed[id(param)].is_called(name)


def _by_name(name: str, param: Tensor, placed: Mapping[int, Placed]) -> Named:
    place = placed.get(id(param))
    if place is not None and place.is_inside(name):
        return Named(name, param, users=place.item.users, around=place.item.around)
    return Named(name, param)


def _made_up(group: Handed, index: int, position: int, policy: str | None) -> str:
    role = group.role or policy
    named = any(group.names) and group.role is None  # most likely the caller forgot a name
    if role is None or named:
        raise TypeError(
            f"params of group {index} holds a tensor of shape {tuple(group.params[position].shape)} without a name: no"
            f" live module has it as a parameter. {HOW_TO_NAME}"
        )
    return f"group{index}.{role}.{position}"


def _make_labels_unique(items: Iterable[Named], placed: Mapping[int, Placed], known: Mapping[Tensor, str]) -> None:
    """Make equal names unique, by the names in the whole model, then by the models' class names."""
    new = {id(item.param): item for item in items if item.param not in known}
    taken = set(known.values())
    if not _shared(new.values(), taken):
        return
    own = [item for key, item in new.items() if key in placed and placed[key].item is item]
    for item in own:
        item.label = item.name
    if _shared(new.values(), taken):
        roots = {id(placed[id(item.param)].root): placed[id(item.param)].root for item in own}
        names = _names_of(roots, taken)
        for item in own:
            item.label = f"{names[id(placed[id(item.param)].root)]}.{item.name}"
    if shared := _shared(new.values(), taken):
        raise ValueError(
            f"several parameters are called {shared[0]}, and no live module tells them apart. Give each its own name:"
            ' [("a." + name, parameter) for name, parameter in a.named_parameters()]'
        )


def _shared(items: Iterable[Named], taken: Collection[str]) -> list[str]:
    counts = Counter(item.label for item in items)
    return [label for label, count in counts.items() if count > 1 or label in taken]


def _names_of(roots: Mapping[int, nn.Module], taken: Collection[str]) -> dict[int, str]:
    """Name each of several models by its class, with a number where necessary."""
    names: dict[int, str] = {}
    kinds = Counter(type(root).__name__ for root in roots.values())
    for key, root in roots.items():
        kind = type(root).__name__
        choices = chain([kind] if kinds[kind] == 1 else [], (f"{kind}{number}" for number in count(1)))
        names[key] = next(name for name in choices if not any(label.startswith(f"{name}.") for label in taken))
        taken = {*taken, f"{names[key]}."}
    return names
