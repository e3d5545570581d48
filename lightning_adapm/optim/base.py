"""The engine of every optimizer of the package: groups with roles, pieces, batches, and the state of each."""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.cache import DeviceCache
from lightning_adapm.optim import groups, in_backward, options
from lightning_adapm.optim.in_backward import Selection
from lightning_adapm.optim.replaced import Built, Places
from lightning_adapm.roles.assign import assign_roles
from lightning_adapm.roles.context import Named
from lightning_adapm.roles.inputs import read_groups
from lightning_adapm.roles.live import find_roots
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import local, shape_of
from lightning_adapm.sharding.fsdp1 import gradients
from lightning_adapm.state.state_dict import FORMAT_VERSION, Checkpointed
from lightning_adapm.step import by_kernels, by_torch
from lightning_adapm.step.batching import Batch, Bucket, batches, bucketed, put_back
from lightning_adapm.step.counters import StepCounters
from lightning_adapm.step.nonfinite import NonFiniteGradients
from lightning_adapm.step.parts import Alike, Part, new_state, parts_of
from lightning_adapm.step.paths import Path, StepPath, path_of
from lightning_adapm.step.watching import Observer

_NO_GRADIENT = "{}.step() found no gradient on any of its parameters, so nothing is trained"

_FOUND_AGAIN = {
    "_held",
    "_groups",
    "_parts",
    "_alike",
    "_settings",
    "_cache",
    "_counters",
    "_rates",
    "_holding",
    "_places",
}
"""Attributes that depend on the process and on modules, and which :meth:`RoleOptimizer.parts` and others find anew."""


class RoleOptimizer(Checkpointed):
    """An optimizer that treats every parameter by its role in the transformer.

    The engine finds names and roles, cuts fused weights into pieces, and takes pieces of one shape through a step
    together. It handles sharded parameters, gradients that are not finite, updates inside backward, saving and loading.
    A subclass specifies the moments of each piece:

    - :meth:`momentum_for` and :meth:`second_moment_for` choose the moments of a piece;
    - :attr:`structure` names the options of a parameter group that shape the state;
    - its ``__init__`` has its own options, and passes those that a parameter group may override as ``defaults``.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, any iterable of ``(name, tensor)`` or of tensors,
            or parameter groups whose ``params`` are one of these. Names, modules and head counts are those of the
            live module that holds the tensors. Where none does, names are needed, or a group's ``role``; a group
            may also state ``n_head``, ``n_query_groups`` and ``head_size``.
        defaults: Options of the parameter groups: at least ``lr``, ``weight_decay``, ``no_decay`` and ``maximize``.
            ``rounding`` is ``"stochastic"`` where they do not state it.
        roles: Roles for names, ``{regular expression: role or policy}``, searched in order before any built-in rule.
        unmatched: Policy of matrices without a known role. ``"error"`` refuses and lists them.
        update_in_backward: Whether ``step(closure)`` moves parameters and frees their gradients inside backward.
        roles_matter: Whether a matrix is treated by its role, so that a role that is not found is worth a warning.
        left_over: Keywords that the subclass has no parameters for: those of ``torch.optim.AdamW`` get a warning.

    Raises:
        ValueError: An option is out of range, or a matrix has no role.
        TypeError: Parameters lack names and roles, or are complex.
    """

    observer: Observer | None = None

    foreign = options.FOREIGN

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        roles: Mapping[str, str] | None = None,
        unmatched: str = "error",
        update_in_backward: bool = False,
        roles_matter: bool = True,
        left_over: Mapping[str, Any] | None = None,
    ) -> None:
        options.check_caller()
        groups.check_left_over(type(self), left_over or {})
        options.check_roles(roles, unmatched)
        defaults = {"rounding": "stochastic", **defaults}
        defaults = options.plain(defaults, defaults, unmatched) | {"format_version": FORMAT_VERSION}
        self.check_options(defaults)
        self.name_rules = dict(roles or {})
        self.unmatched = unmatched
        self.roles_matter = roles_matter
        self.update_in_backward = update_in_backward
        self.gradient_norm: Tensor | None = None
        """Norm of the last step's gradients, where it updated in backward and left none to measure."""
        # what every parameter is, by identity; not part of a checkpoint
        self.names: dict[Tensor, str] = {}
        self.roles: dict[Tensor, str] = {}
        self.pieces: dict[Tensor, tuple[Piece, ...]] = {}
        self.reasons: dict[Tensor, str] = {}
        self.blocks: dict[Tensor, str | None] = {}
        """Name of the transformer block around each parameter; None outside."""
        self._numbers: dict[Tensor, int] = {}  # the same for a parameter on every process
        self._forget([])
        self._nonfinite = NonFiniteGradients()
        self.built: dict[Tensor, Built] = {}
        """Names, shapes and options that the pieces and the state of every parameter were made for."""
        self._places: list[Places] | None = []
        super().__init__([{"params": []}], defaults)  # torch adds groups one by one, and roles are found over all
        self.param_groups.clear()
        self._add(read_groups(params))

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        """Choose the momentum of a piece whose matrix has ``shape`` over all processes."""
        raise NotImplementedError(f"{type(self).__name__} has no momentum_for(piece, shape, group)")

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        """Choose the second moment of a piece whose matrix has ``shape`` over all processes."""
        raise NotImplementedError(f"{type(self).__name__} has no second_moment_for(piece, shape, group)")

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Refuse options of a parameter group that are out of range, by raising a ValueError."""
        options.check(group)

    def check_pieces(self, item: Named, pieces: tuple[Piece, ...], group: Mapping[str, Any]) -> None:
        """Refuse pieces of a parameter that this optimizer cannot treat, by raising a ValueError."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim`` does, of anything that the constructor takes. Roles are those that the
        parameters have in the whole model. A group that is refused changes nothing.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        self._add([param_group])

    def _add(self, added: list[dict[str, Any]]) -> None:
        """Add groups together: all of them, or none where one is refused."""
        filled = [groups.fill(group, self.defaults, self.unmatched) for group in added]
        for group in filled:
            self.check_options(group)
        before = len(self.param_groups)
        assigned = assign_roles(
            filled, self.names, before, self.name_rules, self.unmatched, self.roles_matter, self.check_pieces
        )
        try:
            for group in assigned.groups:
                super().add_param_group(group)
        except Exception:
            del self.param_groups[before:]
            raise
        for group, own in zip(added, assigned.groups, strict=True):
            group.update(own)  # as with torch, the caller's group is the optimizer's: wrappers change rates in it
        self.param_groups[before:] = added
        self.names.update(assigned.names)
        self.roles.update(assigned.roles)
        self.pieces.update(assigned.pieces)
        self.reasons.update(assigned.reasons)
        self.blocks.update(assigned.blocks)
        for group in added:
            structure = {option: copy(group[option]) for option in self.structure}
            for param in group["params"]:
                self.built[param] = Built(self.names[param], shape_of(param), structure)
        if self._places is not None:
            self._places.append(Places(assigned.roots.values(), assigned.names))
        first = 1 + max(self._numbers.values(), default=-1)
        self._numbers.update((param, first + place) for place, param in enumerate(assigned.pieces))

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only defaults, state and groups through pickling and deepcopy
        return {**super().__getstate__(), **{key: value for key, value in vars(self).items() if self._is_own(key)}}

    def _is_own(self, attribute: str) -> bool:
        """Whether a copy has the attribute, too: not hooks, wrapped methods, monitors and what is found again."""
        if attribute.startswith("_optimizer_") or attribute in _FOUND_AGAIN:
            return False
        return attribute != "observer" and not callable(getattr(type(self), attribute, None))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget([])  # found again: process groups are not copied
        if "pieces" in state:  # not on loading
            self._places = None  # other modules hold the parameters of a copy

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure`` reevaluates the model and returns the loss."""
        self.follow_groups()
        self._let_go()
        loss, early = None, None
        self._rates.clear()
        if self.update_in_backward:
            sharded = any(self.parts(param)[0].layout is not None for param in self.pieces)
            armed = in_backward.armed(self.param_groups, self.blocks, self._holders(), closure, sharded, self._take)
            with armed as early, torch.enable_grad():
                loss = None if closure is None else closure()
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_not_replaced()
        self.gradient_norm = None if early is None else early.gradient_norm()
        moved = self._take([(index, group["params"]) for index, group in enumerate(self.param_groups)])
        self._nonfinite.finish_step()
        skipped = closure is not None and loss is None  # as Lightning skips a batch
        if not moved and self.gradient_norm is None and not skipped and not self._has_moved():
            warnings.warn(_NO_GRADIENT.format(type(self).__name__), stacklevel=4)
        return loss

    def _let_go(self) -> None:
        """Forget parameters that callers have taken out of the groups, so that their memory is given back."""
        if len(self._held) == len(self.pieces):
            return
        held = set(self._held)
        for known in (self.names, self.roles, self.pieces, self.reasons, self.blocks, self.built, self._numbers):
            for param in known.keys() - held:
                del known[param]
        self._nonfinite.let_go(set(self._numbers.values()))

    def _has_moved(self) -> bool:
        """Whether any parameter ever took a step: gradients that are left out later are so on purpose."""
        return any(self.state[param].get("step") for param in self.pieces if param in self.state)

    def check_not_replaced(self) -> None:
        """Refuse a model whose parameters are no longer those given.

        Raises:
            RuntimeError: Naming the first of them, and where to build the optimizer instead.
        """
        held = {param: self.names[param] for group in self.param_groups for param in group["params"]}
        if self._places is None:
            self._places = [Places(find_roots(held), held, complete=False)]
        self._places = [places.check(held, self) for places in self._places]

    def follow_groups(self) -> None:
        """Let names and roles follow the lists of parameters, which callers may change in place.

        Raises:
            TypeError: A parameter was not added with :meth:`add_param_group`, and no live module holds it.
        """
        self._take_in([group for group in self.param_groups if not self.pieces.keys() >= set(group["params"])])
        for group in self.param_groups:
            params = group["params"]
            if len(set(params)) != len(params):
                params = group["params"] = list(dict.fromkeys(params))
            if [self.names[param] for param in params] != group["param_names"]:
                group["param_names"] = [self.names[param] for param in params]
                group["roles"] = [self.roles[param] for param in params]
        held = [param for group in self.param_groups for param in group["params"]]
        if len(held) != len(self._held) or not all(map(is_, held, self._held)):
            self._forget(held)

    def _take_in(self, groups: list[dict[str, Any]]) -> None:
        """Add groups that callers have put into ``param_groups`` themselves, as callbacks do in a run that resumes."""
        held = self.param_groups
        self.param_groups = [each for each in held if all(each is not group for group in groups)]
        try:
            for group in groups:
                bare = {key: value for key, value in group.items() if key not in ("param_names", "roles")}
                self._add([bare])
                group.update(bare)
        except TypeError:
            for group in groups:
                options.check_held(group, self.pieces)
            raise
        finally:
            self.param_groups = held

    def parts(self, param: Tensor) -> tuple[Part, ...]:
        """Parts of a parameter, with their moments."""
        form = param.shape, param.dtype, param.device
        known = self._parts.get(param)
        # found again in another shape: FSDP1 makes parameters one-dimensional after the optimizer is built
        if known is None or known[0] != form:
            if param not in self._groups:
                self.follow_groups()
            self.built[param].check_shape(param)
            index = self._groups[param]
            self.built[param].check(param, self.param_groups[index], self.state.get(param, {}))
            parts = parts_of(self._numbers[param], self.names[param], param, self.pieces[param])
            for part in parts:
                self._tune(part, index)
            known = self._parts[param] = form, parts
        return known[1]

    def _tune(self, part: Part, index: int) -> None:
        """Give a part what the options of its group, the one with this index, mean."""
        part.tune(self, self.param_groups[index])
        processes = None if part.shard is None else part.shard.layout.group
        common = part.first, part.second, part.decay, part.shape, part.param.dtype, part.param.device, processes
        part.alike = self._alike.setdefault(common, Alike())

    def _retune(self, index: int) -> None:
        """Let parts follow options of their group that have changed."""
        group = self.param_groups[index]
        settings = groups.settings_of(group, (key for key in self.defaults if key != "lr"))
        if settings != self._settings.get(index):
            self._settings[index] = settings
            for param in group["params"]:
                self.built[param].check(param, group, self.state.get(param, {}))
                for part in self._parts[param][1] if param in self._parts else ():
                    self._tune(part, index)

    def _forget(self, held: list[Tensor]) -> None:
        """Drop everything that is found again from pieces and parameter groups, which have the parameters ``held``."""
        self._held = held
        self._groups = {
            param: index for index, group in enumerate(self.param_groups if held else ()) for param in group["params"]
        }
        self._parts: dict[Tensor, tuple[Any, tuple[Part, ...]]] = {}
        self._alike: weakref.WeakValueDictionary[Any, Alike] = weakref.WeakValueDictionary()
        self._settings: dict[int, tuple[Any, ...]] = {}
        self._counters: defaultdict[Tensor, StepCounters] = defaultdict(StepCounters)
        """By the first of the parameters that are counted together."""
        self._rates: dict[int, float] = {}  # of this step, by group
        self._cache = DeviceCache()
        self._holding: list[weakref.ref[nn.Module]] | None = None

    def _holders(self) -> list[nn.Module]:
        """The outermost live modules that hold the parameters."""
        if self._holding is None:  # found late: a LightningModule may be built around a model and its optimizer
            self._holding = [weakref.ref(module) for module in find_roots(self.pieces)]
        return [module for each in self._holding if (module := each()) is not None]

    def _take(self, selected: Selection) -> bool:
        """Take the gradients of parameters, group by group, and move them; whether there were any."""
        for index, params in selected:
            self._retune(index)
            for param in params:
                if (param.requires_grad or param.grad is not None) and "step" not in self.state.get(param, ()):
                    self._make_state(param)
        selected = self._joined(selected)
        found = [gradients(params, [self.parts(param)[0].layout for param in params]) for _, params in selected]
        if not any(grad is not None for grads in found for grad in grads):
            return False
        buckets: list[Bucket] = []
        device = next(param for _, params in selected for param in params).device
        with _without_autocast(device.type), self._cache.in_use():
            try:
                gathered = [self._gather(params, grads) for (_, params), grads in zip(selected, found, strict=True)]
                buckets += chain.from_iterable(gathered)
                self._nonfinite.agree(
                    pair for bucket in buckets for pair in zip(bucket.parts, bucket.grads, strict=True)
                )
                for (index, _), together in zip(selected, gathered, strict=True):
                    self._move_together(together, self._with_number(index))
            finally:
                for bucket in buckets:
                    for part in bucket.parts:
                        part.release()
        return True

    def _joined(self, selected: Selection) -> list[tuple[int, list[Tensor]]]:
        """Groups of equal options as one, so that their parameters step together."""
        joined: dict[Any, tuple[int, list[Tensor]]] = {}
        for index, params in selected:
            settings = groups.settings_of(self.param_groups[index], self.defaults)
            joined.setdefault(settings, (index, []))[1].extend(params)
        return list(joined.values())

    def _with_number(self, index: int) -> Mapping[str, Any]:
        """A group whose learning rate is a number: a tensor on a device, which a step waits for, is read once."""
        group = self.param_groups[index]
        if index not in self._rates:
            self._rates[index] = float(group["lr"])
        return {**group, "lr": self._rates[index]}

    def _make_state(self, param: Tensor) -> None:
        parts = self.parts(param)
        for part in parts:
            options.check_trainable(part.name, part.piece, param, self.unmatched)
        self.state[param].update(new_state(parts, local(param).device))  # wrappers keep theirs in it too

    def _gather(self, params: list[Tensor], grads: list[Tensor | None]) -> Iterable[Bucket]:
        """Count the step of every parameter with a gradient, and sort its parts into buckets that step together."""
        moving: list[tuple[Tensor, tuple[Part, ...]]] = []
        for param, grad in zip(params, grads, strict=True):
            if grad is not None:
                parts = self.parts(param)
                options.check_gradient(parts[0].name, grad)
                if param.numel() or parts[0].layout is not None:
                    held, state = local(param), self.state[param]
                    for part in parts:
                        part.bind(held, state)
                    moving.append((local(grad), parts))
        if not moving:
            return ()
        first = moving[0][1][0].param
        counts = self._counters[first].count([parts[0].state for _, parts in moving])
        return bucketed((grad, parts, step) for (grad, parts), step in zip(moving, counts, strict=True))

    def _move_together(self, buckets: Iterable[Bucket], group: Mapping[str, Any]) -> None:
        ready: list[Batch] = []
        for bucket in buckets:
            path = self._path(bucket.parts, bucket.grads, group)
            for batch in batches(bucket, path):
                if path.kernels:
                    grads = by_kernels.DeviceGradients(batch.grads, self._nonfinite.agreed_on(batch.parts))
                    batch = batch._replace(grads=grads)
                if bucket.parts[0].shard is None:
                    ready.append(batch)
                else:  # one after another: rows that are taken out of parameters may be copies
                    self._update(batch, group)
                    put_back(batch)
        by_kernels.refresh(ready)
        for batch in ready:
            self._update(batch, group)

    def cached_bytes(self) -> int:
        """Bytes that are kept from step to step for speed, besides the state, and freed with the optimizer."""
        return self._cache.nbytes

    def step_paths(self) -> list[StepPath]:
        """List the path of every part in the next step, by kernels or by torch, and why.

        Gradients are assumed to have the dtype and the memory layout of their parameters. Parts of one shape may have
        several rows, for instance where their moments differ.
        """
        rows: list[StepPath] = []
        for index, group in enumerate(self.param_groups):
            self._retune(index)
            alike: defaultdict[Alike, list[Part]] = defaultdict(list)
            for param in group["params"]:
                if param.requires_grad and (param.numel() or self.parts(param)[0].layout is not None):
                    for part in self.parts(param):
                        part.bind(local(param), self.state.get(param, {}))
                        alike[part.alike].append(part)
            for parts in alike.values():
                path = self._path(parts, [part.view for part in parts], group)
                roles = tuple(dict.fromkeys(part.piece.role for part in parts))
                rows.append(StepPath(tuple(parts[0].shape), len(parts), roles, *path))
                for part in parts:
                    part.release()
        return rows

    def _path(self, parts: Sequence[Part], grads: Sequence[Tensor], group: Mapping[str, Any]) -> Path:
        return path_of(parts, grads, bool(group["maximize"]))

    def _update(self, batch: Batch, group: Mapping[str, Any]) -> None:
        grads = batch.grads
        if isinstance(grads, by_kernels.DeviceGradients):
            step = by_kernels.step if batch.path.whole else by_kernels.step_with_reductions
            step(batch, group, self.observer)
            self._nonfinite.count(batch.parts, grads.reading.flaws)
        else:
            # only now, batch by batch: copies of all gradients in float32 would be larger than the state that is saved
            finite = self._nonfinite.replaced(batch.parts, grads, bool(group["maximize"]))
            self._move(batch._replace(grads=finite), group)

    def _move(self, batch: Batch, group: Mapping[str, Any]) -> None:
        """The step itself, of parts of one shape with gradients that are finite, or count as zero."""
        by_torch.step(batch, group, self.observer)

    def nonfinite_gradients(self) -> dict[str, int]:
        """Parameters whose gradient was not finite since this optimizer was built, with the number of steps.

        The pieces of a fused weight are counted by themselves, as ``"attn.qkv.weight (query)"``. The call waits for the
        device.
        """
        return self._nonfinite.steps()


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Keep a caller's autocast, which would take products to half precision, out of a step."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # the meta device has none
