"""The base of every optimizer of the package: a step, and the state of each parameter."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.optim import groups, in_backward, options
from lightning_adapm.optim.part_table import Asked
from lightning_adapm.optim.replaced import check_not_replaced
from lightning_adapm.optim.role_groups import RoleGroups
from lightning_adapm.optim.turns import Selection
from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.roles.inputs import read_groups
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import local, local_grads
from lightning_adapm.sharding.fsdp1 import gradients
from lightning_adapm.step import by_loops, by_torch
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.engine import Engine
from lightning_adapm.step.parts import Part, new_state
from lightning_adapm.step.paths import Path, StepPath, path_of
from lightning_adapm.step.recorder import MOST_BYTES
from lightning_adapm.step.recording import Found
from lightning_adapm.step.watching import Observer
from lightning_adapm.step.work import Work

_NO_GRADIENT = "{}.step() found no gradient on any of its parameters, so nothing is trained"


class RoleOptimizer(RoleGroups):
    """An optimizer that treats every parameter by its role in the transformer.

    It finds names and roles, cuts fused weights into pieces, and updates pieces of one shape together. It also handles
    sharded parameters, gradients that are not finite, updates inside backward, saving and loading.
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
    """Monitor of the steps."""
    most_recorded_bytes = MOST_BYTES
    """Most bytes of temporaries with which a step is recorded on a GPU and then replayed as a CUDA graph, which keeps
    them. 0 records no step. Where processes share rows, a twentieth of the GPU's memory is allowed in any case.
    """

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
        groups.check_left_over(type(self), left_over or {})
        options.check_option({"update_in_backward": update_in_backward}, "update_in_backward", *options.SWITCH)
        self.update_in_backward = update_in_backward
        self._norms: list[Tensor] = []
        """Norms of the last step's gradients, where it updated in backward."""
        self._engine = Engine()
        self._rates: dict[int, float] = {}
        """Learning rates of this step, by group."""
        super().__init__({"rounding": "stochastic", **defaults}, roles, unmatched, roles_matter)
        self._add(read_groups(params))

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        """Choose the momentum of a piece. Equal moments of pieces of one shape are computed together.

        Args:
            piece: The piece, with its role.
            shape: Shape of its matrix ``(m, n)`` over all processes, of a stack of matrices ``(b, m, n)``, or of a
                vector.
            group: Options of its parameter group, as ``defaults`` name them.
        """
        raise NotImplementedError(f"{type(self).__name__} needs a method momentum_for(piece, shape, group)")

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        """Choose the second moment of a piece. Arguments are those of :meth:`momentum_for`."""
        raise NotImplementedError(f"{type(self).__name__} needs a method second_moment_for(piece, shape, group)")

    @property
    def gradient_norm(self) -> Tensor | None:
        """Norm of the last step's gradients, where it updated in backward and left none to measure."""
        return torch.linalg.vector_norm(torch.stack(self._norms)) if self._norms else None

    @torch._disable_dynamo  # torch.optim does the same where a step cannot be compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure`` reevaluates the model and returns the loss."""
        self.follow_groups()
        self._drop_removed()
        self._rates.clear()
        with self._armed(closure) as early, torch.enable_grad():
            loss = None if closure is None else closure()
        self._registry.places = check_not_replaced(self._registry.places, self, self.names)
        self._norms = [] if early is None else early.norms()
        selected: Selection = [(index, group["params"]) for index, group in enumerate(self.param_groups)]
        moved, _ = self._move_selected(selected if early is None else in_backward.left_over(selected, self.state))
        self._engine.nonfinite.finish_step()
        skipped = closure is not None and loss is None  # how Lightning skips a batch
        if not moved and not self._norms and not skipped and not self._has_moved():
            warn_caller(_NO_GRADIENT.format(type(self).__name__))
        return loss

    def _armed(self, closure: Callable[[], Any] | None) -> AbstractContextManager[in_backward.EarlyUpdates | None]:
        """Let parameters move inside the backward pass of ``closure``, if they are to."""
        if not self.update_in_backward:
            return nullcontext()
        table = self._table
        return in_backward.armed(
            self.param_groups, self.blocks, table.modules(), closure, table.turns, self._move_selected
        )

    def _has_moved(self) -> bool:
        """Whether any parameter ever took a step. After that, missing gradients are deliberate."""
        return any(self.state[param].get("step") for param in self.pieces if param in self.state)

    def _move_selected(self, selected: Selection) -> tuple[list[Work], Sequence[Found]]:
        """Move the selected parameters along their gradients.

        Returns:
            The parameters that moved, and what kernels found out about their gradients.
        """
        for index, _ in selected:
            self._table.retune(index, self)
        joined = groups.joined(selected, self.param_groups, self.defaults)
        asked = [(self._with_lr_as_number(index), params) for index, params in joined if params]
        works = self._table.recall(asked, self.state) or self._collect(asked)
        return works, self._engine.move(works, self) if works else ()

    def _collect(self, asked: Asked) -> list[Work]:
        """Collect the parameters that have gradients, and make the state of those that have none yet."""
        for param in chain.from_iterable(params for _, params in asked):
            if (param.requires_grad or param.grad is not None) and "step" not in self.state.get(param, ()):
                self._make_state(param)
        works = [work for group, params in asked if (work := self._work(group, params)).held]
        self._table.remember(asked, works, self.state)
        return works

    def _make_state(self, param: Tensor) -> None:
        parts = self.parts(param)
        for part in parts:
            options.check_trainable(type(self).__name__, part.name, part.piece, param, self.unmatched)
        self.state[param].update(new_state(parts, local(param).device))  # wrappers may have entries of their own

    def _work(self, group: Mapping[str, Any], params: list[Tensor]) -> Work:
        """Collect the parameters that have a gradient here or on another process, and an element on any process."""
        parts = [self.parts(param) for param in params]
        grads = gradients(params, [each[0].layout for each in parts])
        moving = []
        for param, own, grad in zip(params, parts, grads, strict=True):
            if grad is not None:
                options.check_gradient(type(self).__name__, own[0].name, grad)
                (held,) = local_grads([grad], [param])
                moving.append((own, local(param), held, self.state[param]))
        return Work.of(group, moving)

    def _with_lr_as_number(self, index: int) -> Mapping[str, Any]:
        """Return a group with its learning rate as a number. A tensor, perhaps on a device, is read once a step."""
        group = self.param_groups[index]
        if index not in self._rates:
            self._rates[index] = float(group["lr"])
        return {**group, "lr": self._rates[index]}

    def path_for(self, parts: Sequence[Part], grads: Sequence[Tensor], group: Mapping[str, Any]) -> Path:
        """Choose the path of parts that are alike; see :func:`lightning_adapm.step.paths.path_of`."""
        return path_of(parts, grads, bool(group["maximize"]))

    def move(self, batch: Batch, group: Mapping[str, Any]) -> None:
        """Move parts of one shape without kernels. Gradients that are not finite have been replaced by zeros."""
        step = by_loops.step if batch.path.loops else by_torch.step
        step(batch, group, self.observer)

    def parts(self, param: Tensor) -> tuple[Part, ...]:
        """Parts of a parameter, with their moments."""
        if param not in self._table:
            self.follow_groups()
        return self._table.parts(param, self)

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only defaults, state and groups through pickling and deepcopy
        return {**super().__getstate__(), **{key: value for key, value in vars(self).items() if self._is_own(key)}}

    def _is_own(self, attribute: str) -> bool:
        """Whether a copy keeps the attribute. Hooks, wrapped methods, monitors and what can be rebuilt are left out."""
        if attribute.startswith("_optimizer_") or attribute in ("_table", "observer"):
            return False
        return not callable(getattr(type(self), attribute, None))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drop_caches()

    def _drop_caches(self, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        super()._drop_caches(groups)
        self._engine.forget()

    def _drop_removed(self) -> None:
        """Forget parameters that callers have removed from the groups, so that their memory is freed."""
        if len(self._table.held) != len(self.pieces):
            self._registry.keep_only(set(self._table.held))
            self._engine.nonfinite.keep_only(set(self._registry.numbers.values()))

    def cached_bytes(self) -> int:
        """Bytes that are kept between steps for speed, in addition to the state; they are freed with the optimizer."""
        return self._engine.cached_bytes

    def step_paths(self) -> list[StepPath]:
        """List the path of every part in the next step, by kernels or by torch, and why.

        Gradients are assumed to have the dtype and the memory layout of their parameters. Parts of one shape may have
        several rows, for instance where their moments differ.
        """
        rows: list[StepPath] = []
        for index, group in enumerate(self.param_groups):
            self._table.retune(index, self)
            trained = [(param, local(param)) for param in group["params"] if param.requires_grad]
            moving = ((self.parts(param), held, held, self.state.get(param, {})) for param, held in trained)
            rows += self._engine.paths(Work.of(group, moving), self)
        return rows

    def nonfinite_gradients(self) -> dict[str, int]:
        """Parameters whose gradient was not finite since this optimizer was built, with the number of steps.

        The pieces of a fused weight are counted separately, as ``"attn.qkv.weight (query)"``. The call waits for the
        device.
        """
        return self._engine.nonfinite.steps()
