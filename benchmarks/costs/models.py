"""Models whose parameters have exactly the shapes of published ones, and how many of their layers fit in memory."""

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.studies.decoder import Decoder, Shape


@dataclass(frozen=True)
class Exact(Shape):
    """A shape with explicit MLP, head and positions; see :class:`Shape` for the rest."""

    hidden: int = 0
    tied: bool = False
    rotary: bool = True


MODELS: dict[str, Shape] = {
    # of 30 million parameters
    "gpt2": Shape(layers=8, width=512, n_head=8, context=512, vocab=8192),
    "llama": Shape(layers=8, width=512, n_head=8, context=512, vocab=4096, llama=True, n_query_groups=4),
    # published; tables of tokens as litgpt pads them
    "pythia-160m": Exact(layers=12, width=768, n_head=12, context=2048, vocab=50304, hidden=3072),
    "gpt2-124m": Exact(
        layers=12, width=768, n_head=12, context=1024, vocab=50257, hidden=3072, tied=True, rotary=False
    ),
    "llama-3.2-1b": Exact(
        layers=16,
        width=2048,
        n_head=32,
        context=8192,
        llama=True,
        n_query_groups=8,
        vocab=128256,
        hidden=8192,
        tied=True,
    ),
    "gpt2-1.5b": Exact(
        layers=48, width=1600, n_head=25, context=1024, vocab=50257, hidden=6400, tied=True, rotary=False
    ),
    "llama-3-8b": Exact(
        layers=32, width=4096, n_head=32, context=8192, llama=True, n_query_groups=8, vocab=128256, hidden=14336
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def numel(shape: Shape) -> int:
    """Parameters of a shape, without allocating them."""
    with torch.device("meta"):
        return sum(param.numel() for param in Decoder(shape).parameters())


def free_bytes(device: str) -> int:
    """Memory that could still be allocated on ``device``."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def shorten(shape: Shape, bytes_per_parameter: float, budget: int) -> Shape | None:
    """Reduce the shape to as many layers as fit into ``budget`` bytes; None if not even one fits."""
    one, two = numel(replace(shape, layers=1)), numel(replace(shape, layers=2))
    layers = 1 + int((budget / bytes_per_parameter - one) // (two - one))
    return replace(shape, layers=min(layers, shape.layers)) if layers > 0 else None


def materialize(shape: Shape, device: str, dtype: torch.dtype) -> Decoder:
    """Build a decoder with random weights on its device and in its dtype, without a copy in float32 or on the host."""
    with torch.device("meta"):
        model = Decoder(shape).to(dtype)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=0.02)
            else:
                nn.init.constant_(param, 0.0 if name.endswith("bias") else 1.0)
    return model
