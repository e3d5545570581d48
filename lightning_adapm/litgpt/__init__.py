"""LitGPT's models, data and checkpoints for the Trainer; requires ``pip install 'lightning-adapm[litgpt]'``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_adapm.litgpt.module import LitGPTModule

__all__ = ["LitGPTModule"]


def __getattr__(name: str) -> Any:
    # imported late, because the checks for litgpt's own command line need no Trainer
    if name == "LitGPTModule":
        from lightning_adapm.litgpt.module import LitGPTModule

        return LitGPTModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
