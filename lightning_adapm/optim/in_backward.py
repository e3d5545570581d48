"""Updates inside backward: each parameter moves, and its gradient is freed, once the gradient is complete.

The method is LOMO's (arXiv 2306.09782). Hooks act only while :func:`armed`, inside ``step(closure)``. A backward pass
outside of it (gradient accumulation, a gradient scaler, litgpt's loop) leads to an ordinary, equal step.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Selection = Sequence[tuple[int, list[Tensor]]]
"""Indices of parameter groups, each with parameters of it."""


@contextmanager
def armed(
    groups: Iterable[dict[str, Any]],
    closure: Callable[[], Any] | None,
    sharded: bool,
    take: Callable[[Selection], Any],
) -> Iterator[dict[Tensor, Tensor]]:
    """Within the context, ``take`` each parameter of ``groups`` once its gradient is complete, and free the gradient.

    Where gradients must wait for the end of backward, a warning is given instead, which Python shows once.

    Yields:
        The squared gradient norm of every parameter that was taken.

    Raises:
        ValueError: The Trainer behind ``closure`` clips gradients by norm, or its module clips them itself.
        RuntimeError: Backward runs a second time in the same step.
    """
    taken: dict[Tensor, Tensor] = {}
    if closure is None or sharded or _in_process_group():
        reason = "step() got no closure" if closure is None else "gradients of several processes are added after it"
        warnings.warn(f"update_in_backward=True frees no gradient early here: {reason}", stacklevel=6)
        yield taken
        return
    clip = clip_value_of(closure)
    last: list[Tensor] = []

    def free() -> None:
        while last:
            last.pop().grad = None

    @torch.no_grad()
    def update(index: int, param: Tensor) -> None:
        if param in taken:
            raise RuntimeError(
                "the closure ran backward twice, and update_in_backward=True has moved parameters in between;"
                " add the losses and run backward once, or pass update_in_backward=False"
            )
        assert param.grad is not None
        if clip is not None:
            param.grad.clamp_(-clip, clip)
        exact = torch.promote_types(param.grad.dtype, torch.float32)
        taken[param] = torch.linalg.vector_norm(param.grad, dtype=exact).square()
        take([(index, [param])])
        free()
        if clip is None:
            param.grad = None
        else:  # torch's clip_grad_value_, which the Trainer still calls, fails without any gradient
            last.append(param)

    handles = [
        param.register_post_accumulate_grad_hook(partial(update, index))
        for index, group in enumerate(groups)
        for param in group["params"]
        if param.requires_grad
    ]
    try:
        yield taken
    finally:
        free()
        for handle in handles:
            handle.remove()


def _in_process_group() -> bool:
    # also of one process: DDP puts gradients back at the end of backward, and they would be taken twice
    return dist.is_available() and dist.is_initialized()


def clip_value_of(closure: Any) -> float | None:
    """The ``gradient_clip_val`` by value of the Lightning Trainer behind a closure, which finds no gradients to clip.

    Warns of hooks of the module that find none either.

    Raises:
        ValueError: The Trainer clips by norm, or the module clips gradients itself.
    """
    while isinstance(closure, partial):
        for argument in closure.args:
            trainer = getattr(argument, "_trainer", None)
            if trainer is not None:
                _check_hooks(type(argument))
                check_clipping(trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
                return float(trainer.gradient_clip_val) if trainer.gradient_clip_val else None
        closure = closure.func
    return None


def check_clipping(value: float | None, algorithm: Any) -> None:
    """Refuse clipping by norm.

    Raises:
        ValueError: Gradients would be clipped by norm.
    """
    if value and str(getattr(algorithm, "value", algorithm) or "norm") == "norm":
        raise ValueError(
            f"gradient_clip_val={value} by norm needs the gradients of the whole model at once, and"
            " update_in_backward=True frees each as soon as it is used; write gradient_clip_algorithm='value', or no"
            " gradient_clip_val (AdaPM and AdaLomo bound every update by clip_threshold), or update_in_backward=False"
        )


def _check_hooks(module: type) -> None:
    if _overrides(module, "configure_gradient_clipping"):
        raise ValueError(
            f"{module.__name__}.configure_gradient_clipping() finds no gradients: update_in_backward=True frees each as"
            " soon as it is used; take the method out and write Trainer(gradient_clip_val=...,"
            " gradient_clip_algorithm='value'), or pass update_in_backward=False"
        )
    for hook in ("on_after_backward", "on_before_optimizer_step"):
        if _overrides(module, hook):
            warnings.warn(
                f"{module.__name__}.{hook}() finds no gradients: update_in_backward=True has used and freed them."
                " Their norm is the optimizer's gradient_norm, after the step",
                stacklevel=8,
            )


def _overrides(module: type, method: str) -> bool:
    """Whether a LightningModule overrides a method, without importing Lightning."""
    owner = next((each for each in module.__mro__ if method in vars(each)), object)
    return owner is not object and owner.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
