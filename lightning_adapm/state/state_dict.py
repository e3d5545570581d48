"""Saving and loading of state, in its own precision and in the form that the strategy saves."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.state.convert import restored_state
from lightning_adapm.state.settings import AS_BUILT, as_built, kept_settings
from lightning_adapm.state.sharded import export_state
from lightning_adapm.step.parts import Part

FORMAT_VERSION = 1
"""Version of the format of the state, kept in every parameter group."""


class Checkpointed(Optimizer):
    """Saving and loading for optimizers with state by pieces, where ``torch.optim`` differs."""

    structure: ClassVar[tuple[str, ...]] = ()
    """Options of a parameter group that shape the state. On loading, this optimizer's own stay."""
    foreign: ClassVar[frozenset[str]] = frozenset()
    """Options of other optimizers without a meaning here, which are dropped from checkpoints."""

    def parts(self, param: Tensor) -> tuple[Part, ...]:
        """Parts of a parameter, with their moments."""
        raise NotImplementedError

    def follow_groups(self) -> None:
        """Bring what is known of parameters into line with the groups' lists, which callers may change in place."""

    def all_parts(self) -> Iterator[tuple[Part, ...]]:
        """The parts of every parameter."""
        return (self.parts(param) for group in self.param_groups for param in group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as ``torch.optim`` does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[AS_BUILT] = as_built(group, self.defaults, self.structure)

    def state_dict(self) -> dict[str, Any]:
        """State dict as in ``torch.optim``; for sharded parameters in the form that their strategy saves.

        Call it on all processes that hold a part of a parameter.
        """
        self.follow_groups()

        def export(_: Optimizer, packed: dict[str, Any]) -> None:
            for saved, group in zip(packed["param_groups"], self.param_groups, strict=True):
                for index, param in zip(saved["params"], group["params"], strict=True):
                    if index in packed["state"]:
                        packed["state"][index] = export_state(self.parts(param), packed["state"][index], self.all_parts)

        # before the caller's hooks, which may return something of another form
        with _hooks(self.register_state_dict_post_hook(export, prepend=True)):
            return super().state_dict()

    def as_own(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return a saved state as this optimizer would have saved it; the caller's hooks on loading come before."""
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by AdaPM or by ``torch.optim.AdamW``.

        Hyperparameters (``lr``, ``betas``, ``weight_decay`` and so on) come from the checkpoint, as in torch. What
        shapes the state (``rank``, ``second_moment``, policies, ``state_dtype``, roles) is this optimizer's: a state
        saved with other settings is converted. One warning names the options that differ, and the values used.

        Raises:
            ValueError: The state cannot be loaded. Nothing has been changed then.
        """
        self.follow_groups()
        loaded: dict[Any, Any] = {}
        differing: list[str] = []

        # Temporary hooks, innermost on both sides: torch casts floating-point state to the parameter's dtype, which
        # would round a float32 second moment of a bfloat16 parameter.
        def before(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            saved = self.as_own(saved)
            groups, words = kept_settings(
                saved["param_groups"], self.param_groups, FORMAT_VERSION, self.structure, self.foreign
            )
            loaded.update(restored_state(self.param_groups, self.parts, saved))
            differing.extend(words)
            params = {key for group in saved["param_groups"] for key in group["params"]}
            others = {key: value for key, value in saved["state"].items() if key not in params}
            return {"state": others, "param_groups": groups}

        def after(_: Optimizer) -> None:
            self.state.update(loaded)

        # state made in inference mode could not be updated outside of it
        with (
            torch.inference_mode(False),
            _hooks(
                self.register_load_state_dict_pre_hook(before),
                self.register_load_state_dict_post_hook(after, prepend=True),
            ),
        ):
            super().load_state_dict(state_dict)
        if differing:
            warn_caller(
                f"{type(self).__name__} goes on with {', '.join(differing)}: hyperparameters come from the checkpoint"
                " and may be set in param_groups after loading, what shapes the state comes from the code"
            )


@contextmanager
def _hooks(*handles: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
