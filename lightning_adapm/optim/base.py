"""The engine of every optimizer of the package: groups with roles, pieces, batches, and the state of each."""

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments import policy
from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.optim import groups, in_backward, options
from lightning_adapm.optim.replaced import Built, Places
from lightning_adapm.roles.assign import assign_roles
from lightning_adapm.roles.context import Named
from lightning_adapm.roles.inputs import read_groups
from lightning_adapm.roles.live import find_roots
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import local, shape_of
from lightning_adapm.sharding.fsdp1 import gradients
from lightning_adapm.sharding.rows import column_range
from lightning_adapm.state.state_dict import FORMAT_VERSION, Checkpointed
from lightning_adapm.step import by_kernels
from lightning_adapm.step.by_torch import update
from lightning_adapm.step.counters import StepCounters
from lightning_adapm.step.nonfinite import NonFiniteGradients
from lightning_adapm.step.parts import (
    Alike,
    Bucket,
    Observer,
    Placement,
    Plan,
    Task,
    batches,
    reduction_of,
    shares_basis,
)

_NO_GRADIENT = "{}.step() found no gradient on any of its parameters, so nothing is trained"


class RoleOptimizer(Checkpointed):
    """An optimizer that treats every parameter by its role in the transformer.

    The engine finds names and roles, cuts fused weights into pieces, and takes pieces of one shape through a step
    together. It handles sharded parameters, gradients that are not finite, updates inside backward, saving and loading.
    A subclass says what is remembered of each piece:

    - :meth:`momentum_for` and :meth:`second_moment_for` choose the moments of a piece;
    - :attr:`structure` names the options of a parameter group that shape the state;
    - its ``__init__`` has its own options, and passes those that a parameter group may override as ``defaults``.

    Args:
        params: ``model.named_parameters()``, ``model.parameters()``, any iterable of ``(name, tensor)`` or of tensors,
            or parameter groups whose ``params`` are one of these. Names, modules and head counts are those of the
            live module that holds the tensors. Where none does, names are needed, or a group's ``role``; a group
            may also state ``n_head``, ``n_query_groups`` and ``head_size``.
        defaults: Options of the parameter groups: at least ``lr``, ``weight_decay``, ``no_decay`` and ``maximize``.
        roles: Roles for names, ``{regular expression: role or policy}``, searched in order before any built-in rule.
        unmatched: Policy of matrices without a known role. ``"error"`` refuses and lists them.
        update_in_backward: Whether ``step(closure)`` moves each parameter and frees its gradient inside backward.
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
        self._forget_places()
        self._nonfinite = NonFiniteGradients()
        self.built: dict[Tensor, Built] = {}
        """What the pieces and the state of every parameter are made for."""
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
        for group in added:
            structure = {option: copy(group[option]) for option in self.structure}
            for param in group["params"]:
                self.built[param] = Built(self.names[param], shape_of(param), structure)
        if self._places is not None:
            self._places.append(Places(assigned.roots.values(), assigned.names))

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only defaults, state and groups through pickling and deepcopy
        kept = {key: value for key, value in vars(self).items() if not key.startswith("_") and self._is_own(key)}
        return {**super().__getstate__(), **kept, "_nonfinite": self._nonfinite}

    def _is_own(self, attribute: str) -> bool:
        """Whether a public attribute is the optimizer's own, not a wrapped method or a monitor."""
        return attribute != "observer" and not callable(getattr(type(self), attribute, None))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_places()  # found again: process groups are not copied
        if "pieces" in state:  # not on loading
            self._places = None  # other modules hold the parameters of a copy

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure`` reevaluates the model and returns the loss."""
        self.follow_groups()
        self._let_go()
        loss, updated = None, {}
        self._rates.clear()
        if self.update_in_backward:
            sharded = any(self.placement(param).layout is not None for param in self.pieces)
            with in_backward.armed(self.param_groups, closure, sharded, self._take) as updated, torch.enable_grad():
                loss = None if closure is None else closure()
        elif closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_not_replaced()
        self.gradient_norm = torch.stack(list(updated.values())).sum().sqrt() if updated else None
        moved = self._take([(group, group["param_names"], group["params"]) for group in self.param_groups])
        self._nonfinite.finish_step()
        skipped = closure is not None and loss is None  # as Lightning skips a batch
        if not moved and not updated and not skipped and not self._has_moved():
            warnings.warn(_NO_GRADIENT.format(type(self).__name__), stacklevel=4)
        return loss

    def _let_go(self) -> None:
        """Forget parameters that callers have taken out of the groups, so that their memory is given back."""
        if sum(len(group["params"]) for group in self.param_groups) == len(self.pieces):
            return
        held = {param for group in self.param_groups for param in group["params"]}
        for known in (self.names, self.roles, self.pieces, self.reasons, self._placements, self._plans):
            for param in known.keys() - held:
                del known[param]
        self._nonfinite.let_go(held)

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

    def _take(self, selected: Sequence[tuple[dict[str, Any], list[str], list[Tensor]]]) -> bool:
        """Move parameters by their gradients, group by group; return whether there were any gradients."""
        for group, names, params in selected:
            for name, param in zip(names, params, strict=True):
                if (param.requires_grad or param.grad is not None) and "step" not in self.state.get(param, ()):
                    for piece in self.pieces[param]:
                        options.check_trainable(name, piece, param, self.unmatched)
                    self.built[param].check(param, group, {})
                    self.state[param].update(self.make_state(param, group, param))  # wrappers keep theirs in it too
        selected = self._joined(selected)
        grads = [gradients(params, [self.placement(param).layout for param in params]) for _, _, params in selected]
        if not any(grad is not None for found in grads for grad in found):
            return False
        with _without_autocast(next(param for _, _, params in selected for param in params).device.type):
            gathered = [self._gather(*each, found) for each, found in zip(selected, grads, strict=True)]
            tasks = (task for buckets in gathered for bucket in buckets for task in bucket.tasks)
            self._nonfinite.agree(tasks, chain.from_iterable(each[2] for each in selected))
            for (group, _, _), buckets in zip(selected, gathered, strict=True):
                self._move_together(buckets, self._with_number(group))
        return True

    def _joined(
        self, selected: Sequence[tuple[dict[str, Any], list[str], list[Tensor]]]
    ) -> list[tuple[dict[str, Any], list[str], list[Tensor]]]:
        """Groups of equal options as one, so that their parameters step together."""
        joined: dict[Any, tuple[dict[str, Any], list[str], list[Tensor]]] = {}
        for group, names, params in selected:
            _, all_names, all_params = joined.setdefault(groups.settings_of(group, self.defaults), (group, [], []))
            all_names += names
            all_params += params
        return list(joined.values())

    def _with_number(self, group: dict[str, Any]) -> Mapping[str, Any]:
        """A group whose learning rate is a number: a tensor on a device, which a step waits for, is read once."""
        if id(group) not in self._rates:
            self._rates[id(group)] = float(group["lr"])
        return {**group, "lr": self._rates[id(group)]}

    def _forget_places(self) -> None:
        self._placements: dict[Tensor, tuple[torch.Size, Placement]] = {}
        self._plans: dict[Tensor, tuple[tuple[Any, ...], list[Plan]]] = {}
        self._alike: weakref.WeakValueDictionary[Any, Alike] = weakref.WeakValueDictionary()
        self._settings: dict[int, tuple[Any, ...]] = {}
        self._counters: defaultdict[int, StepCounters] = defaultdict(StepCounters)
        self._rates: dict[int, float] = {}  # of this step, by group

    def placement(self, param: Tensor) -> Placement:
        """Placement of a parameter's pieces, with the shapes of their matrices over all processes."""
        # kept for the shape it was found with: FSDP1 makes parameters one-dimensional after the optimizer is built
        shape, found = self._placements.get(param, (None, None))
        if found is None or shape != param.shape:
            self.built[param].check_shape(param)
            found = Placement.of(param, self.pieces[param])
            self._placements[param] = (param.shape, found)
        return found

    def _placed_momentum(self, param: Tensor, index: int, group: Mapping[str, Any]) -> Momentum:
        """Momentum of a piece, limited to the part that this process keeps."""
        placement = self.placement(param)
        shape, shard = placement.shapes[index], placement.shards[index]
        momentum = self.momentum_for(self.pieces[param][index], shape, group)
        if (
            shard is None
            or not isinstance(momentum, LowRankMomentum)
            or not shares_basis(shard.layout, group.get("basis", "auto"))
        ):
            return momentum
        return replace(momentum, columns=column_range(shard.layout, shape[-1]))

    def make_state(self, param: Tensor, group: Mapping[str, Any], like: Tensor, whole: bool = False) -> dict[str, Any]:
        """Zero state of one parameter of ``group``, on ``like``'s device; every key that it will ever have.

        It is of what this process holds of the parameter, or of the ``whole`` parameter.
        """
        like = local(like)
        exact = torch.float64 if param.dtype == torch.float64 else torch.float32
        state: dict[str, Any] = {"step": torch.tensor(0.0, dtype=torch.float32)}
        placement = self.placement(param)
        for index, (piece, shape) in enumerate(zip(self.pieces[param], placement.shapes, strict=True)):
            held = shape if whole else placement.local_shape(index)
            momentum = self.momentum_for(piece, shape, group) if whole else self._placed_momentum(param, index, group)
            stored = policy.storage_dtype(momentum, group.get("state_dtype"), exact)
            made = momentum.make(held, like.new_empty((), dtype=stored))
            made |= self.second_moment_for(piece, shape, group).make(held, like.new_empty((), dtype=exact))
            state |= {piece.prefix + key: value for key, value in made.items()}
        return state

    def _gather(
        self, group: dict[str, Any], names: list[str], params: list[Tensor], grads: list[Tensor | None]
    ) -> Iterable[Bucket]:
        """Count the step of every parameter with a gradient, and sort its pieces into buckets that step together."""
        settings = groups.settings_of(group, (key for key in self.defaults if key != "lr"))
        if settings == self._settings.get(id(group)):
            settings = self._settings[id(group)]  # the same one is compared faster
        self._settings[id(group)] = settings
        moving: list[tuple[str, Tensor, Tensor, list[Plan]]] = []
        for name, param, grad in zip(names, params, grads, strict=True):
            if grad is not None:
                options.check_gradient(name, grad)
                plans = self._planned(param, group, settings)
                if plans:
                    moving.append((name, param, local(grad), plans))
        if not moving:
            return ()
        counts = self._counters[id(group)].count([self.state[param] for _, param, _, _ in moving])
        buckets: dict[Any, Bucket] = {}
        for (name, param, grad, plans), step in zip(moving, counts, strict=True):
            part, state = local(param), self.state[param]
            for plan in plans:
                task = plan.task(name, param, part, grad, state)
                key = plan.alike, step, plan.momentum.due(step), task.state.get("seeded")
                if key not in buckets:
                    buckets[key] = Bucket(plan, step, [])
                buckets[key].tasks.append(task)
        return buckets.values()

    def _planned(self, param: Tensor, group: Mapping[str, Any], settings: tuple[Any, ...]) -> list[Plan]:
        """Plan of the steps for each piece of a parameter, renewed when anything that it depends on has changed."""
        depends = settings, param.shape, param.dtype, param.device
        known = self._plans.get(param)
        if known is not None and known[0] == depends:
            return known[1]
        self.built[param].check(param, group, self.state[param])
        placement, plans = self.placement(param), []
        for index, piece in enumerate(self.pieces[param] if placement.layout is not None or param.numel() else ()):
            shape, shard = placement.shapes[index], placement.shards[index]
            momentum = self._placed_momentum(param, index, group)
            second_moment = self.second_moment_for(piece, shape, group)
            decay = 0.0 if piece.role in group["no_decay"] else float(group["weight_decay"])
            processes = None if shard is None else shard.layout.group
            common = momentum, second_moment, decay, shape, param.dtype, param.device, processes
            alike = self._alike.setdefault(common, Alike())
            plans.append(Plan(piece, placement.layout, shard, momentum, second_moment, decay, alike))
        self._plans[param] = depends, plans
        return plans

    def _move_together(self, buckets: Iterable[Bucket], group: Mapping[str, Any]) -> None:
        ready: list[by_kernels.Batch] = []
        for bucket in buckets:
            plan, step, tasks = bucket
            if tasks[0].shard is not None:
                self._move_shards(bucket, group)
                continue
            as_they_are = self._as_they_are(tasks, plan, group)
            together = batches(bucket, copied=not as_they_are)
            ready += [self._batch(batch, plan, step, as_they_are) for batch in together]
        by_kernels.refresh(ready)
        for each in ready:
            self._update(each, group)

    def _move_shards(self, bucket: Bucket, group: Mapping[str, Any]) -> None:
        """Take pieces out of the local parts, which may copy them, one batch after another."""
        plan, step, _ = bucket
        for batch in batches(bucket, copied=True):
            taken = [task.taken() for task in batch]
            self._update(self._batch(taken, plan, step, self._as_they_are(taken, plan, group)), group)
            for task, moved in zip(batch, taken, strict=True):
                assert task.shard is not None
                task.shard.put(task.param, moved.param)

    def _as_they_are(self, tasks: list[Task], plan: Plan, group: Mapping[str, Any]) -> bool:
        """Whether a step uses the gradients of ``tasks`` without copying them."""
        if self.observer is not None or group["maximize"]:
            return False
        return by_kernels.takes(tasks, plan.momentum, plan.second_moment)

    def _batch(self, tasks: list[Task], plan: Plan, step: int, as_they_are: bool) -> by_kernels.Batch:
        grads = by_kernels.DeviceGradients(tasks, self._nonfinite.agreed_on(tasks)) if as_they_are else None
        return by_kernels.Batch(tasks, plan, step, grads)

    def _update(self, batch: by_kernels.Batch, group: Mapping[str, Any]) -> None:
        tasks, grads = batch.tasks, batch.grads
        if grads is None:
            # only now, batch by batch: copies of all gradients in float32 would be larger than the state that is saved
            tasks = self._nonfinite.replace(tasks, group["maximize"])
            self._move(tasks, [task.grad for task in tasks], batch.plan, batch.step, group)
        else:
            if batch.by_kernels:
                by_kernels.step(batch, group)
            else:
                self._move(tasks, grads, batch.plan, batch.step, group)
            self._nonfinite.count(tasks, grads.reading.flaws)

    def _move(self, tasks: list[Task], grads: list[Tensor], plan: Plan, step: int, group: Mapping[str, Any]) -> None:
        """Move pieces of one shape by ``grads``, which are finite or zero."""
        states, reduction = [task.state for task in tasks], reduction_of(tasks)
        direction = plan.momentum.direction(grads, states, step, reduction)
        update(tasks, grads, direction, plan.second_moment, step, reduction, plan.decay, group, self.observer)

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
