"""Saving and loading: state that keeps its precision, in the form that its strategy saves, from whatever saved it."""

from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.optim import Optimizer

from lightning_adapm.optim import options
from lightning_adapm.state.convert import restored_state
from lightning_adapm.state.sharded import export_state

if TYPE_CHECKING:
    from lightning_adapm.optim.adapm import AdaPM

FORMAT_VERSION = 1
"""Of the optimizer's state, kept in every parameter group."""


class Checkpointed(Optimizer):
    """What AdaPM does differently from ``torch.optim.Optimizer`` when it is saved and loaded."""

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim`` has it; of sharded parameters in the form that their strategy saves.

        To be called on all processes that hold a part of a parameter.
        """

        # A temporary hook before all others, so that they see what is saved and may change or replace it.
        def export(_: Optimizer, packed: dict[str, Any]) -> None:
            for saved, group in zip(packed["param_groups"], self.param_groups, strict=True):
                for index, param in zip(saved["params"], group["params"], strict=True):
                    if index in packed["state"]:
                        packed["state"][index] = export_state(cast("AdaPM", self), param, group, packed["state"][index])

        handle = self.register_state_dict_post_hook(export, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state saved by AdaPM or by ``torch.optim.AdamW``.

        Hyperparameters come from the checkpoint, as in torch. What shapes the state (``rank``, ``second_moment``,
        policies, ``state_dtype``, roles) is this optimizer's: a state saved with other settings is converted.

        Raises:
            ValueError: the state has no meaning here; nothing has been changed then.
        """
        loaded: dict[Tensor, dict[str, Any]] = {}

        # Temporary hooks, innermost on both sides: torch casts floating-point state to the parameter's dtype, which
        # would round a float32 second moment of a bfloat16 parameter.
        def before(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            kept = options.kept_settings(saved, self.param_groups, FORMAT_VERSION)
            loaded.update(restored_state(cast("AdaPM", self), saved))
            return {"state": {}, "param_groups": kept}

        def after(_: Optimizer) -> None:
            self.state = defaultdict(dict, loaded)

        handles = (
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
