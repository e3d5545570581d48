"""Updates inside backward: blocks of parameters move, and their gradients are freed, as soon as these are complete.

The method is LOMO's (arXiv 2306.09782), which moves each parameter by itself. Hooks act only while :func:`armed`,
inside ``step(closure)``. A backward pass outside of it (gradient accumulation, a gradient scaler, litgpt's loop) leads
to an ordinary, equal step.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adapm.optim.clipping import clip_value_for
from lightning_adapm.optim.turns import Selection, Turn, Turns, Waiting, params_of
from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.step.norms import norms_of, norms_of_step
from lightning_adapm.step.recording import Found
from lightning_adapm.step.work import Work

_ACCUMULATED = (
    "update_in_backward=True saves no gradient memory here: {:,.1f} MiB of gradients were held before the step's"
    " backward pass, as accumulate_grad_batches and zero_grad(set_to_none=False) do. Moments need the sum over all"
    " accumulated batches, so that it must be held. Use larger batches with activation checkpointing instead"
)

_CHANGED = (
    "gradients were changed after backward, as clip_grad_norm_ does, but update_in_backward=True had moved parameters"
    " by the unchanged ones. Clip with Trainer(gradient_clip_val=..., gradient_clip_algorithm='value'), change"
    " gradients in param.register_hook, or pass update_in_backward=False"
)

_TWICE = (
    "the closure ran backward twice, as a layer does that is used twice under checkpoint(use_reentrant=True), and"
    " update_in_backward=True has moved parameters in between; add the losses and run backward once, or pass"
    " update_in_backward=False"
)

Hook = Callable[[Tensor], None]
Take = Callable[[Selection], tuple[Sequence[Work], Sequence[Found]]]


class EarlyUpdates:
    """One step that moves parameters inside backward.

    Args:
        params: All parameters that require a gradient.
        clip: Bound on the entries of gradients, None for no bound.
        take: Function that moves parameters along their gradients, and returns the work and what kernels found.
    """

    def __init__(self, params: Sequence[Tensor], clip: float | None, take: Take) -> None:
        self._params, self._clip, self._take = params, clip, take
        self._began = False
        self._moved: list[Tensor] = []
        self._norms: list[Tensor] = []
        self._kept: Tensor | None = None
        """A moved parameter that still has its gradient: torch's clip_grad_value_, which the Trainer calls after
        backward, fails if no parameter has one."""
        self._seen: tuple[Tensor, Tensor, int] | None = None
        """A parameter, its last gradient in backward, and the version counter of that gradient."""

    def hooks(self) -> Iterable[tuple[Tensor, Hook]]:
        """Pair parameters with the hooks to call when their gradients are complete."""
        raise NotImplementedError

    def finish(self, turns: Turns) -> None:
        """Save what this step has found out for the steps after it."""
        raise NotImplementedError

    @torch.no_grad()
    def _move(self, selected: Selection) -> None:
        params = params_of(selected)
        grads = [_gradient(param) for param in params]
        if self._clip is not None:
            torch._foreach_clamp_min_(grads, -self._clip)
            torch._foreach_clamp_max_(grads, self._clip)
        self._norms += norms_of_step(*self._take(selected))
        self._moved += params
        self._kept = min(params, key=torch.numel)
        self._see(self._kept)
        for param in params:
            if param is not self._kept:
                param.grad = None

    def _see(self, param: Tensor) -> None:
        grad = _gradient(param)
        self._seen = param, grad, grad._version

    def free(self) -> None:
        """Free the gradient that was kept."""
        self._seen = None
        if self._kept is not None:
            self._kept.grad = None
            self._kept = None

    def check_unchanged(self) -> None:
        """Refuse gradients that arrived, or were changed (by clipping, for instance), after their parameters had moved.

        Raises:
            RuntimeError: There is such a gradient.
        """
        if self._clip is None and self._moved and self._seen is not None:
            param, grad, version = self._seen
            if param.grad is not None and (param.grad is not grad or grad._version != version):
                raise RuntimeError(_CHANGED)
        if any(param.grad is not None for param in self._moved if param is not self._kept):
            raise RuntimeError(_TWICE)

    def norms(self) -> list[Tensor]:
        """Norms of all gradients of this step, those still to be used included; empty if no gradient came early."""
        if not self._began or len(self._moved) == len(self._params):
            return self._norms
        return self._norms + norms_of([param.grad for param in self._params if param.grad is not None])


class OneByOne(EarlyUpdates):
    """A step that notices when each gradient is complete.

    Args:
        waiting: Collection of the parameters that wait for others.
    """

    def __init__(self, params: Sequence[Tensor], clip: float | None, take: Take, waiting: Waiting) -> None:
        super().__init__(params, clip, take)
        self._waiting = waiting
        self._arrived: set[Tensor] = set()
        self._turns: list[Turn] = []
        self._held_before = 0
        """Bytes of gradients that were there before this backward pass added to them, without the first parameter's."""

    def hooks(self) -> Iterable[tuple[Tensor, Hook]]:
        return ((param, self._complete) for param in self._params)

    def finish(self, turns: Turns) -> None:
        if self._held_before:
            warn_caller(_ACCUMULATED.format(self._held_before / 2**20))
        elif len(self._moved) == len(self._params):
            turns.keep(self._params, self._turns)

    def _complete(self, param: Tensor) -> None:
        """Collect a parameter whose gradient is complete, and move all that wait when it is time."""
        if param in self._arrived:
            raise RuntimeError(_TWICE)
        if not self._began:
            others = (each for each in self._params if each is not param)
            self._held_before = sum(each.nbytes for each in others if each.grad is not None)
        self._began = True
        self.free()
        self._arrived.add(param)
        self._see(param)
        if self._waiting.add(param):
            self._turns.append(self._waiting.take())
            self._move(self._turns[-1].selected)


class InTurns(EarlyUpdates):
    """A step whose gradients come as in an earlier one, so that the first and the last of each turn alone have a hook.

    Gradients that come otherwise move with the next turn. No parameter has a gradient before.

    Args:
        turns: The turns.
    """

    def __init__(self, params: Sequence[Tensor], clip: float | None, take: Take, turns: Sequence[Turn]) -> None:
        super().__init__(params, clip, take)
        self._turns = turns
        self._next = 0
        self._as_before = True

    def hooks(self) -> Iterable[tuple[Tensor, Hook]]:
        for index, turn in enumerate(self._turns):
            if turn.first is not turn.last:
                yield turn.first, lambda _: self.free()
            yield turn.last, partial(self._complete, index)

    def finish(self, turns: Turns) -> None:
        if not self._as_before or (self._began and self._next < len(self._turns)):
            turns.give_up()

    def _complete(self, index: int, last: Tensor) -> None:
        """Move a turn, the last gradient of which is complete."""
        self._began = True
        self.free()
        turn = self._turns[index]
        self._as_before &= index == self._next and all(param.grad is not None for param in turn.params)
        self._next += 1
        self._move(turn.selected if self._as_before else self._late(last))

    def _late(self, last: Tensor) -> Selection:
        """All parameters with a gradient that have not moved."""
        moved = set(self._moved)
        if last in moved:
            raise RuntimeError(_TWICE)
        found: dict[int, list[Tensor]] = {}
        for turn in self._turns:
            for index, params in turn.selected:
                left = [param for param in params if param.grad is not None and param not in moved]
                found.setdefault(index, []).extend(left)
        return [(index, params) for index, params in sorted(found.items()) if params]


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


@contextmanager
def armed(
    groups: Sequence[Mapping[str, Any]],
    blocks: Mapping[Tensor, str | None],
    modules: Iterable[nn.Module],
    closure: Callable[[], Any] | None,
    turns: Turns,
    take: Take,
) -> Iterator[EarlyUpdates | None]:
    """Within the context, ``take`` parameters soon after their gradients are complete, and free these.

    :class:`Waiting` says how soon. Parameters that still have a gradient afterwards are left to the caller. Where all
    gradients must wait for the end of backward, a warning says so, which Python shows once, and nothing else happens.
    Another one says what accumulation costs.

    Raises:
        ValueError: The Trainer of one of ``modules`` clips gradients by norm, or the module clips them itself.
        RuntimeError: Backward runs a second time in the same step, or gradients are changed after it.
    """
    if closure is None or _in_process_group():
        reason = "step() got no closure" if closure is None else "gradients of several processes are added after it"
        warn_caller(f"update_in_backward=True frees no gradient early here: {reason}")
        yield None
        return
    params = [param for group in groups for param in group["params"] if param.requires_grad]
    clip, known = clip_value_for(modules), turns.of(params)
    early: EarlyUpdates
    if known and all(param.grad is None for param in params):
        early = InTurns(params, clip, take, known)
    else:
        early = OneByOne(params, clip, take, Waiting(groups, blocks))
    handles = [param.register_post_accumulate_grad_hook(hook) for param, hook in early.hooks()]
    try:
        yield early
        early.check_unchanged()
        early.finish(turns)
    finally:
        early.free()
        for handle in handles:
            handle.remove()


def left_over(selected: Selection, states: Mapping[Tensor, Any]) -> Selection:
    """Select those that are to move after backward: parameters that still have a gradient, or no state yet."""

    def is_left(param: Tensor) -> bool:
        return param.grad is not None or (param.requires_grad and "step" not in states.get(param, ()))

    left = ((index, list(filter(is_left, params))) for index, params in selected)
    return [(index, params) for index, params in left if params]


def _in_process_group() -> bool:
    # also of one process: DDP puts gradients back at the end of backward, and they would be taken twice
    return dist.is_available() and dist.is_initialized()
