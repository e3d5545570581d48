"""Checks for clipping and hooks after backward, which come too late for updates inside backward."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.roles.live import attribute, is_lightning


def clip_value_for(modules: Iterable[nn.Module]) -> float | None:
    """The ``gradient_clip_val`` by value of the Trainer that now trains one of ``modules``; None without clipping.

    Warns of hooks of the module that find no gradients.

    Raises:
        ValueError: The Trainer clips by norm, or the module clips gradients itself.
    """
    for module in filter(is_lightning, modules):
        trainer = attribute(module, "trainer")
        if attribute(trainer, "training"):
            _check_hooks(type(module))
            check_clipping(trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
            return float(trainer.gradient_clip_val) if trainer.gradient_clip_val else None
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
            warn_caller(
                f"{module.__name__}.{hook}() finds no gradients: update_in_backward=True has used and freed them."
                " Their norm is the optimizer's gradient_norm, after the step"
            )


def _overrides(module: type, method: str) -> bool:
    """Whether a LightningModule overrides a method, without importing Lightning."""
    owner = next((each for each in module.__mro__ if method in vars(each)), object)
    return owner is not object and owner.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
