"""The small decoders that every benchmark trains: GPT-2-like or Llama-like, one file, torch alone."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    ``llama``: RMSNorm, SwiGLU, rotary positions, an untied head and no biases; otherwise GPT-2's LayerNorm, GELU,
    learned positions, tied head and biases. ``n_query_groups`` key and value heads, ``n_head`` if None.
    """

    layers: int
    width: int
    n_head: int
    context: int
    llama: bool = False
    n_query_groups: int | None = None
    vocab: int = 256

    @property
    def hidden(self) -> int:
        """Rows of the MLP: 4 widths, or 8/3 (rounded up to 64) where there is a gate as well."""
        return math.ceil(self.width * 8 / 3 / 64) * 64 if self.llama else 4 * self.width

    def build(self) -> nn.Module:
        return Decoder(self)

    def __str__(self) -> str:
        kind = "Llama-like" if self.llama else "GPT-2-like"
        words = (
            f"A {kind} decoder: {self.layers} layers, width {self.width}, {self.n_head} heads,"
            f" {self.n_query_groups or self.n_head} of keys and values"
        )
        return words if self.unit == "byte" else f"{words}, a vocabulary of {self.vocab} tokens"

    @property
    def unit(self) -> str:
        """What is predicted: bytes, or tokens of a vocabulary that is larger."""
        return "byte" if self.vocab <= 256 else "token"

    @property
    def tied(self) -> bool:
        """The head is the table of tokens."""
        return not self.llama

    @property
    def rotary(self) -> bool:
        """Positions turn queries and keys; otherwise they are a table."""
        return self.llama


class RMSNorm(nn.Module):
    """Root-mean-square norm, of operations that vmap knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def norm(shape: Shape) -> nn.Module:
    return RMSNorm(shape.width) if shape.llama else nn.LayerNorm(shape.width)


class Attention(nn.Module):
    """Causal attention; the rows of ``qkv`` are all queries, all keys, all values."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.n_head, self.n_query_groups = shape.n_head, shape.n_query_groups or shape.n_head
        self.head_size, bias = shape.width // shape.n_head, not shape.llama
        self.qkv = nn.Linear(shape.width, (self.n_head + 2 * self.n_query_groups) * self.head_size, bias=bias)
        self.proj = nn.Linear(self.n_head * self.head_size, shape.width, bias=bias)

    def forward(self, x: Tensor, batch: int, turn: Tensor | None) -> Tensor:
        heads = self.qkv(x).view(batch, -1, self.n_head + 2 * self.n_query_groups, self.head_size).transpose(1, 2)
        q, k, v = heads.split((self.n_head, self.n_query_groups, self.n_query_groups), dim=1)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        shared = self.n_head // self.n_query_groups
        if shared > 1:
            k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).reshape(x.shape[0], -1))


def turns(time: int, head_size: int, device: torch.device) -> Tensor:
    """Cosines and sines of rotary positions (arXiv 2104.09864), ``(2, time, head_size / 2)``.

    Computed once for all blocks: in a compiled block every element of queries and keys would compute its own.
    """
    half = head_size // 2
    rates = 10000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angles = torch.arange(time, device=device, dtype=torch.float32)[:, None] * rates
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions of :func:`turns` on ``(batch, heads, time, head_size)``."""
    cos, sin = turn.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class MLP(nn.Module):
    """GELU, or SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False) if shape.llama else None
        self.up = nn.Linear(shape.width, shape.hidden, bias=not shape.llama)
        self.down = nn.Linear(shape.hidden, shape.width, bias=not shape.llama)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


class Block(nn.Module):
    """Pre-norm attention and MLP on the residual stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = norm(shape), Attention(shape), norm(shape), MLP(shape)

    def forward(self, x: Tensor, batch: int, turn: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm_1(x), batch, turn)
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """Map tokens ``(batch, time)`` to logits ``(batch * time, vocab)``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_size = shape.width // shape.n_head if shape.rotary else None
        self.wte = nn.Embedding(shape.vocab, shape.width)
        self.wpe = None if shape.rotary else nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = norm(shape)
        self.lm_head = None if shape.tied else nn.Linear(shape.width, shape.vocab, bias=False)
        for name, param in self.named_parameters():
            if param.dim() == 2:  # GPT-2's: outputs on the residual stream start smaller
                on_stream = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / math.sqrt(2 * shape.layers) if on_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    @property
    def head(self) -> Tensor:
        """Weight of the head."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        """Output of the last norm, ``(batch * time, width)``."""
        batch, time = tokens.shape
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe.weight[:time]
        turn = None if self.head_size is None else turns(time, self.head_size, x.device)
        x = x.flatten(0, 1)  # so that under vmap a linear layer is one batched product
        for block in self.blocks:
            x = block(x, batch, turn)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.head)
