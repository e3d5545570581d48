"""LitGPT's models, data and checkpoints for the Trainer. Needs ``pip install 'lightning-adapm[litgpt]'``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_adapm.litgpt.module import LitGPTModule

__all__ = ["LitGPTModule"]


def __getattr__(name: str) -> Any:
    # late: the checks of litgpt's own command line need nothing of the Trainer's module
    if name == "LitGPTModule":
        from lightning_adapm.litgpt.module import LitGPTModule

        return LitGPTModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
