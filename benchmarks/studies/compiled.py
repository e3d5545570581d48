"""Faster training of large models by compiled blocks and the fastest attention."""

from contextlib import AbstractContextManager

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The first that takes the tensors is used."""


def compile_blocks(model: nn.Module) -> None:
    """Let every block of a model run compiled, or all of a model without blocks.

    Blocks are alike, so one of them is compiled for all, and for those of every later run in this process.
    """
    blocks = getattr(model, "blocks", None)
    for part in blocks if isinstance(blocks, nn.ModuleList) else (model,):
        part.compile(dynamic=False)


def fastest_attention() -> AbstractContextManager[None]:
    """A context in which attention runs by the first of :data:`ATTENTION` that can."""
    return sdpa_kernel(ATTENTION, set_priority=True)
