"""Checks for parameters that were replaced or changed after their optimizer was built, which would train wrongly."""

import gc
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.roles.context import plain
from lightning_adapm.roles.live import children_of, find_roots, parameters_of, walk
from lightning_adapm.sharding.find import is_dtensor, local, shape_of

_Module = weakref.ref[nn.Module]


class Places:
    """Places where live modules hold parameters of an optimizer.

    Nothing is kept alive: neither a model whose training is over nor a parameter that its group has dropped.

    Args:
        roots: The outermost modules that hold the parameters.
        names: The parameters with their names.
        complete: Whether no parameter has been replaced yet, so that nothing else that the modules hold now is a
            replacement. Otherwise :meth:`check` finds out.
    """

    def __init__(self, roots: Iterable[nn.Module], names: Mapping[Tensor, str], complete: bool = True) -> None:
        self._roots: list[_Module] = []
        self._children: list[tuple[_Module, str, _Module]] = []
        self._own: list[tuple[_Module, str, int]] = []
        self._names = {id(param): {plain(name)} for param, name in names.items()}
        self._others: set[tuple[int, str]] = set()
        self._complete = complete
        for index, root in enumerate(roots):
            self._roots.append(weakref.ref(root))
            for path, around in walk(root):
                here = weakref.ref(around[0])
                self._children += [(here, name, weakref.ref(child)) for name, child in children_of(around[0]).items()]
                for name, param in parameters_of(around[0]).items():
                    full = plain(f"{path}.{name}" if path else name)
                    if param in names:
                        self._own.append((here, name, id(param)))
                        self._names[id(param)].add(full)
                    elif complete:
                        self._others.add((index, full))

    @property
    def are_as_before(self) -> bool:
        """Whether no module has changed since these places were found, so that there is nothing to check."""
        return self._complete and self._unchanged()

    def check(self, held: Mapping[Tensor, str], optimizer: Optimizer) -> "Places":
        """Refuse to train parameters that their modules no longer have, while those in their place stay as they are.

        Parameters that another live optimizer trains are none of them.

        Args:
            held: All parameters of the optimizer, with their names.
            optimizer: The optimizer.

        Returns:
            These places, or those of now where modules have changed.

        Raises:
            RuntimeError: Naming the first parameter that took the place of the optimizer's.
        """
        if self.are_as_before:
            return self
        roots = [(index, root) for index, each in enumerate(self._roots) if (root := each()) is not None]
        found = [(root, *each) for index, root in roots for each in self._found(index, root)]
        present = {id(param) for _, _, param in found}
        tracked = {param: name for param, name in held.items() if id(param) in self._names}
        lost = [param for param in tracked if param.requires_grad and id(param) not in present]
        by_name = {name: param for param in lost for name in self._names[id(param)]}
        new = [
            (root, name, param)
            for root, name, param in found
            if lost and param.requires_grad and param not in held and not _is_gathered(by_name.get(plain(name)), param)
        ]
        elsewhere = _trained_by_others(optimizer) if new else set()
        new = [each for each in new if id(each[2]) not in elsewhere]
        # FSDP1's flat parameters have names of their own
        replacing = new if len(lost) == len(tracked) else [each for each in new if plain(each[1]) in by_name]
        if replacing:
            raise RuntimeError(_refusal(type(optimizer).__name__, replacing[0][0], [name for _, name, _ in replacing]))
        if new:
            gone = ", ".join(held[param] for param in lost)
            warn_caller(
                f"{', '.join(name for _, name, _ in new)} of {type(new[0][0]).__name__} will not be trained: no"
                f" optimizer has it. {type(optimizer).__name__} still has {gone}, which the model has lost. Add new"
                " parameters with add_param_group, or build the optimizer anew"
            )
        return Places([root for _, root in roots], tracked)

    def _unchanged(self) -> bool:
        for here, name, child in self._children:
            module = here()
            if module is None or module._modules.get(name) is not child():
                return False
        for here, name, key in self._own:
            module = here()
            if module is None or id(module._parameters.get(name)) != key:
                return False
        return True

    def _found(self, index: int, root: nn.Module) -> Iterable[tuple[str, Tensor]]:
        """Parameters of a module that are new to it or belong to the optimizer."""
        for path, around in walk(root):
            for name, param in parameters_of(around[0]).items():
                full = f"{path}.{name}" if path else name
                if (index, plain(full)) not in self._others:
                    yield full, param


def check_not_replaced(
    known: Sequence[Places] | None, optimizer: Optimizer, names: Mapping[Tensor, str]
) -> Sequence[Places]:
    """Refuse a model whose parameters are no longer those of its optimizer.

    Args:
        known: Places where its parameters were; None where they are still to be found.
        optimizer: The optimizer.
        names: Names of its parameters.

    Returns:
        The places where its parameters are now.

    Raises:
        RuntimeError: Naming the first parameter that was replaced, and where to build the optimizer instead.
    """
    if known is not None and all(places.are_as_before for places in known):
        return known
    held = {param: names[param] for group in optimizer.param_groups for param in group["params"]}
    if known is None:
        known = [Places(find_roots(held), held, complete=False)]
    return [places.check(held, optimizer) for places in known]


def _is_gathered(held: Tensor | None, param: Tensor) -> bool:
    """Whether a parameter is the whole of a sharded one, which FSDP2 puts in its place from forward to backward."""
    return is_dtensor(held) and not is_dtensor(param) and held.shape == param.shape


def _trained_by_others(optimizer: Optimizer) -> set[int]:
    live = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer) and thing is not optimizer]
    groups = [group for other in live for group in vars(other).get("param_groups", ())]
    return {id(param) for group in groups for param in group["params"]}


def _refusal(optimizer: str, model: nn.Module, names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"{names[0]}{more} of {type(model).__name__} would not be trained: put in the place of {optimizer}'s parameters"
        " after it was built, as fully_shard, ModelParallelStrategy, load_state_dict(assign=True),"
        " resize_token_embeddings and new heads do. Build"
        f" {optimizer} after that, in configure_optimizers (AdaPMMixin does) and not by LightningCLI's optimizer"
        " option; where fully_shard and a forward pass came before, after model.reshard()"
    )


class Built(NamedTuple):
    """Shape and options for which a parameter's pieces and state were made."""

    name: str
    shape: torch.Size
    """Shape of the whole parameter, over all processes."""
    options: dict[str, Any]
    """Options of the group that shape the state."""

    def check_shape(self, param: Tensor) -> None:
        """Refuse a parameter that has another shape now.

        Raises:
            RuntimeError: Naming it, with both shapes.
        """
        shape = shape_of(param)
        if shape != self.shape:
            raise RuntimeError(
                f"{self.name} had the shape {tuple(self.shape)} when its optimizer was built and has {tuple(shape)}"
                " now. Its role, pieces and state are those of the old shape: build the optimizer after resizing"
            )

    def check(self, param: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Refuse options that the state cannot follow, and a state that a moved parameter has left behind.

        Raises:
            ValueError: An option was changed in the parameter group.
            RuntimeError: The parameter is on another device than its state.
        """
        for option, value in self.options.items():
            if group[option] != value:
                raise ValueError(
                    f"{self.name} had {option}={value!r} when it was added and its parameter group has"
                    f" {option}={group[option]!r} now, which its state cannot follow. Build a new optimizer with that"
                    " option and load this one's state_dict into it, which converts the state"
                )
        device = local(param).device
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.device != device:
                raise RuntimeError(
                    f"{self.name} is on {device} and its state ({key}) on {value.device}: the model was moved after the"
                    " first step. Move it before the optimizer is built, or load the optimizer's state_dict afterwards"
                )
