"""The parts of an optimizer's parameters, with the moments that the options of their groups select."""

import weakref
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from lightning_adapm.optim.groups import settings_of
from lightning_adapm.optim.registry import Registry
from lightning_adapm.optim.turns import Turns, are, params_of
from lightning_adapm.roles.live import find_roots
from lightning_adapm.sharding.find import local_grads, locals_of
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.step import graphs
from lightning_adapm.step.engine import Rule
from lightning_adapm.step.fingerprint import Fingerprint
from lightning_adapm.step.parts import Alike, Part, parts_of
from lightning_adapm.step.work import Work

_GRAD, _DTYPE = attrgetter("grad"), attrgetter("dtype")

States = Mapping[Tensor, dict[str, Any]]
"""States of parameters."""
Asked = Sequence[tuple[Mapping[str, Any], list[Tensor]]]
"""Options of a step, each set with the parameters that it applies to."""


class Moved:
    """The work of one step, in a form that is quickly compared with a later step; keeps no gradients and no states.

    Args:
        asked: Parameters, with the options that apply to them.
        works: The work of the step, which covers all of these parameters.
        states: States of the optimizer's parameters.
    """

    def __init__(self, asked: Asked, works: Sequence[Work], states: States) -> None:
        self._params = params_of(asked)
        self._held, self._properties = Fingerprint(locals_of(self._params)), _properties(self._params)
        self._trained = list(states)
        place = {param: index for index, param in enumerate(states)}
        self._places = [place[param] for param in self._params]
        self._states = Fingerprint(())
        self._found = [(work.parts, work.held) for work in works]
        self._unmoved = object()

    def recall(self, asked: Asked, states: States) -> list[Work] | None:
        """Return this step's work if it is that of the remembered step, with other gradients; else None."""
        params = params_of(asked)
        same = (
            [len(each) for _, each in asked] == [len(parts) for parts, _ in self._found]
            and are(params, self._params)
            and are(states, self._trained)
            and self._held.matches(locals_of(params))
        )
        if not same or _properties(params) != self._properties:
            return None
        kept = list(map(list(states.values()).__getitem__, self._places))
        if not self._follow(kept):
            return None
        grads_left, states_left = iter(local_grads(list(map(_GRAD, params)), params)), iter(kept)
        return [
            Work(
                group,
                parts,
                held,
                list(islice(grads_left, len(parts))),
                list(islice(states_left, len(parts))),
                unmoved=self._unmoved,
            )
            for (group, _), (parts, held) in zip(asked, self._found, strict=True)
        ]

    def _follow(self, states: Sequence[dict[str, Any]]) -> bool:
        """Renew the token of steps if states were replaced or moved; return whether all of them are initialized."""
        objects = list(chain.from_iterable(map(dict.values, states)))
        if self._states.matches(objects):
            return True
        self._states, self._unmoved = Fingerprint(objects), object()
        return all("step" in state for state in states)


def _first(asked: Asked) -> Tensor | None:
    return next((param for _, params in asked for param in params), None)


def _properties(params: Sequence[Tensor]) -> list[Any] | None:
    """Dtypes and strides of the gradients of parameters; None if one is missing or sparse."""
    grads = list(map(_GRAD, params))
    try:
        return [*map(Tensor.stride, grads), *map(_DTYPE, grads)]
    except (TypeError, RuntimeError):
        return None


def _shows_gradients(layout: Layout | None) -> bool:
    """Whether a process has a gradient wherever others have one, which FSDP1 does not grant."""
    return layout is None or layout.mesh is not None


def tune(part: Part, rule: Rule, group: Mapping[str, Any]) -> Part:
    """Give a part the moments and the weight decay that the options of its parameter group select."""
    first = rule.momentum_for(part.piece, part.shape, group)
    return part.tune(first, rule.second_moment_for(part.piece, part.shape, group), group)


class PartTable:
    """The parts of every parameter, for the present lists of the parameter groups.

    A table is replaced when these lists change. It depends on process groups and modules, so it is not copied with its
    optimizer.

    Args:
        registry: Names, roles and pieces of the parameters.
        groups: The parameter groups; empty before they are known.
    """

    def __init__(self, registry: Registry, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        self._registry = registry
        self.held = [param for group in groups for param in group["params"]]
        """All parameters, group by group."""
        self._names = [list(group["param_names"]) for group in groups]
        self._groups = {param: index for index, group in enumerate(groups) for param in group["params"]}
        self._parts: dict[Tensor, tuple[Any, tuple[Part, ...]]] = {}
        self.alike: weakref.WeakValueDictionary[Any, Alike] = weakref.WeakValueDictionary()
        """Tokens of parts that step together, by what they have in common."""
        self._settings: dict[int, tuple[Any, ...]] = {}
        self._moved: dict[Tensor | None, Moved] = {}
        """Parameters that moved together, by the first of them."""
        self.turns = Turns()
        """Parameters that move together inside backward."""
        self._modules: list[weakref.ref[nn.Module]] | None = None

    def __contains__(self, param: Tensor) -> bool:
        return param in self._groups

    def lists(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether parameter groups still have these parameters, with their names."""
        held = [param for group in groups for param in group["params"]]
        named = [group.get("param_names") for group in groups] == self._names
        return named and are(held, self.held)

    def remember(self, asked: Asked, works: Sequence[Work], states: States) -> None:
        """Remember the work of a step if it covers all that was ``asked`` for and every process shows its gradients.

        Only on a GPU, because only there does a step wait for the host.
        """
        if not works or not graphs.can_capture(works[0].device):
            return
        every = [len(work.held) for work in works] == [len(params) for _, params in asked]
        if every and all(_shows_gradients(own[0].layout) for work in works for own in work.parts):
            self._moved[_first(asked)] = Moved(asked, works, states)
        else:
            self._moved.pop(_first(asked), None)

    def recall(self, asked: Asked, states: States) -> list[Work] | None:
        """Return this step's work if only gradients differ from the remembered step; else None."""
        moved = self._moved.get(_first(asked))
        return None if moved is None else moved.recall(asked, states)

    def parts(self, param: Tensor, rule: Rule) -> tuple[Part, ...]:
        """Parts of a parameter, with their moments."""
        form = param.shape, param.dtype, param.device
        known = self._parts.get(param)
        # found again in another shape: FSDP1 makes parameters one-dimensional after the optimizer is built
        if known is None or known[0] != form:
            registry, index = self._registry, self._groups[param]
            registry.built[param].check_shape(param)
            registry.built[param].check(param, rule.param_groups[index], rule.state.get(param, {}))
            parts = parts_of(registry.numbers[param], registry.names[param], param, registry.pieces[param])
            for part in parts:
                self._tune(part, rule, index)
            known = self._parts[param] = form, parts
        return known[1]

    def retune(self, index: int, rule: Rule) -> None:
        """Tune the parts of the group with this ``index`` again if its options have changed."""
        group = rule.param_groups[index]
        settings = settings_of(group, (key for key in rule.defaults if key != "lr"))
        if settings != self._settings.get(index):
            self._settings[index] = settings
            for param in group["params"]:
                self._registry.built[param].check(param, group, rule.state.get(param, {}))
                for part in self._parts[param][1] if param in self._parts else ():
                    self._tune(part, rule, index)

    def _tune(self, part: Part, rule: Rule, index: int) -> None:
        tune(part, rule, rule.param_groups[index])
        rows = None
        if part.shard is not None:  # FSDP1 cuts every parameter elsewhere
            rows = part.shard.layout.group, part.shard.counts if part.shard.layout.mesh is not None else None
        common = part.first, part.second, part.decay, part.shape, part.param.dtype, part.param.device, rows
        part.alike = self.alike.setdefault(common, Alike())

    def modules(self) -> list[nn.Module]:
        """The outermost live modules that hold the parameters."""
        if self._modules is None:  # found late: a LightningModule may be built around a model and its optimizer
            self._modules = [weakref.ref(module) for module in find_roots(self._registry.pieces)]
        return [module for each in self._modules if (module := each()) is not None]
