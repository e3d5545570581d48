"""Updates inside backward: blocks of parameters move, and their gradients are freed, once these are complete.

The method is LOMO's (arXiv 2306.09782), which moves each parameter by itself. Hooks act only while :func:`armed`,
inside ``step(closure)``. A backward pass outside of it (gradient accumulation, a gradient scaler, litgpt's loop) leads
to an ordinary, equal step.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_adapm.optim.clipping import clip_value_for

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

Selection = Sequence[tuple[int, list[Tensor]]]
"""Indices of parameter groups, each with parameters of it."""


class Waiting:
    """Parameters whose gradients are complete and wait for others, so that pieces of one shape move together.

    They wait as long as any gradient that is still to come fits into :attr:`bound` with them.

    Args:
        groups: The parameter groups.
        blocks: Name of the transformer block around each parameter, None outside.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], blocks: Mapping[Tensor, str | None]) -> None:
        self._places = {
            param: (index, place)
            for index, group in enumerate(groups)
            for place, param in enumerate(group["params"])
            if param.requires_grad
        }
        self._to_come = Counter(param.nbytes for param in self._places)
        """Number of gradients that are still to come, by their bytes."""
        self._sizes = sorted(self._to_come, reverse=True)
        """Their different bytes; the smallest come last."""
        together: Counter[str | Tensor] = Counter()
        for param in self._places:
            together[blocks[param] or param] += param.nbytes
        self.bound = max(together.values(), default=0)
        """Bytes of the gradients of the largest transformer block or parameter. No more wait when a gradient comes."""
        self._params: list[Tensor] = []
        self._bytes = 0

    @property
    def params(self) -> Collection[Tensor]:
        """All parameters that require a gradient."""
        return self._places.keys()

    def add(self, param: Tensor) -> bool:
        """Add a parameter whose gradient is complete, and return whether it is time to take all that wait."""
        self._params.append(param)
        self._bytes += param.nbytes
        self._to_come[param.nbytes] -= 1
        while self._sizes and not self._to_come[self._sizes[-1]]:
            self._sizes.pop()
        smallest = self._sizes[-1] if self._sizes else self.bound
        return self._bytes + smallest > self.bound

    def take(self) -> Selection:
        """Empty the collection and return its parameters in the order of their groups."""
        found: dict[int, list[Tensor]] = {}
        for param in sorted(self._params, key=self._places.__getitem__):
            found.setdefault(self._places[param][0], []).append(param)
        self._params, self._bytes = [], 0
        return list(found.items())


class EarlyUpdates:
    """One step that moves parameters inside backward.

    Args:
        waiting: Parameters to move.
        clip: Bound on the entries of gradients, None for no bound.
        take: Function that moves parameters by their gradients.
    """

    def __init__(self, waiting: Waiting, clip: float | None, take: Callable[[Selection], Any]) -> None:
        self._waiting, self._clip, self._take = waiting, clip, take
        self._arrived: set[Tensor] = set()
        self._norms: list[Tensor] = []
        self.held_before = 0
        """Bytes of gradients from before this backward pass, which adds to them, without the first one's."""
        self._kept: Tensor | None = None
        """A moved parameter with a gradient, until the next one comes: torch's clip_grad_value_, which the Trainer
        still calls after backward, fails without any."""
        self._seen: tuple[Tensor, Tensor, int] | None = None
        """A parameter, the last gradient that it had in backward, and the version of that."""

    def complete(self, param: Tensor) -> None:
        """Collect a parameter whose gradient is complete, and move all that wait when it is time.

        Raises:
            RuntimeError: The gradient was complete before in this step.
        """
        if param in self._arrived:
            raise RuntimeError(
                "the closure ran backward twice, and update_in_backward=True has moved parameters in between;"
                " add the losses and run backward once, or pass update_in_backward=False"
            )
        if not self._arrived:
            others = (each for each in self._waiting.params if each is not param)
            self.held_before = sum(each.nbytes for each in others if each.grad is not None)
        self.free()
        self._arrived.add(param)
        if self._clip is not None:
            with torch.no_grad():
                _gradient(param).clamp_(-self._clip, self._clip)
        self._see(param)
        if self._waiting.add(param):
            self._move(self._waiting.take())

    @torch.no_grad()
    def _move(self, selected: Selection) -> None:
        params = [param for _, several in selected for param in several]
        self._norms += _norms(params)
        self._take(selected)
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
        """Refuse changes of gradients, such as clipping, that came after parameters had moved.

        Raises:
            RuntimeError: A gradient was changed.
        """
        if self._clip is None and self._norms and self._seen is not None:
            param, grad, version = self._seen
            if param.grad is not None and (param.grad is not grad or grad._version != version):
                raise RuntimeError(_CHANGED)

    def gradient_norm(self) -> Tensor | None:
        """Norm of all gradients of this step, with those that are still to be taken; None without early gradients."""
        if not self._arrived:
            return None
        left = [param for param in self._waiting.params if param.grad is not None]  # none of them has moved
        return torch.linalg.vector_norm(torch.stack([*self._norms, *_norms(left)]))


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _norms(params: list[Tensor]) -> list[Tensor]:
    """Norm of each gradient."""
    grads = [_gradient(param) for param in params]
    exact = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return list(torch._foreach_norm(grads, 2, dtype=exact)) if grads else []


@contextmanager
def armed(
    groups: Iterable[Mapping[str, Any]],
    blocks: Mapping[Tensor, str | None],
    modules: Iterable[nn.Module],
    closure: Callable[[], Any] | None,
    sharded: bool,
    take: Callable[[Selection], Any],
) -> Iterator[EarlyUpdates | None]:
    """Within the context, ``take`` parameters soon after their gradients are complete, and free these.

    :class:`Waiting` says how soon. Parameters that still have a gradient afterwards are left to the caller. Where all
    gradients must wait for the end of backward, a warning says so, which Python shows once, and nothing else happens.
    Another one says what accumulation costs.

    Raises:
        ValueError: The Trainer of one of ``modules`` clips gradients by norm, or the module clips them itself.
        RuntimeError: Backward runs a second time in the same step, or gradients are changed after it.
    """
    if closure is None or sharded or _in_process_group():
        reason = "step() got no closure" if closure is None else "gradients of several processes are added after it"
        warnings.warn(f"update_in_backward=True frees no gradient early here: {reason}", stacklevel=6)
        yield None
        return
    waiting = Waiting(groups, blocks)
    early = EarlyUpdates(waiting, clip_value_for(modules), take)
    handles = [param.register_post_accumulate_grad_hook(early.complete) for param in waiting.params]
    try:
        yield early
        early.check_unchanged()
        if early.held_before:
            warnings.warn(_ACCUMULATED.format(early.held_before / 2**20), stacklevel=6)
    finally:
        early.free()
        for handle in handles:
            handle.remove()


def _in_process_group() -> bool:
    # also of one process: DDP puts gradients back at the end of backward, and they would be taken twice
    return dist.is_available() and dist.is_initialized()
