"""Tiny models for what projects hand over: two towers of timm-like blocks, and a classifier with a backbone."""

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Tower(nn.Module):
    """Blocks as timm names them; ``forward`` takes ``(b, t, width)``."""

    def __init__(self, width: int = 32, layers: int = 2, num_heads: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class TwoTowers(nn.Module):
    """A wide and a narrow tower, whose parameters have equal names in them."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = Tower(64), Tower(32)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.logit_scale * (self.wide(x).sum() + self.narrow(x[..., :32]).square().mean())


class Classifier(nn.Module):
    """A backbone of blocks with a head of two layers."""

    def __init__(self, width: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.backbone = Tower(width)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean(dim=1))


def by_parameter(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, object]]:
    """Role and pieces of every parameter of an AdaPM optimizer."""
    return {
        param: (role, optimizer.pieces[param])
        for group in optimizer.param_groups
        for param, role in zip(group["params"], group["roles"], strict=True)
    }


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 3, width: int = 64) -> list[Tensor]:
    """Train for some steps on fixed numbers; copies of the parameters after them."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    for _ in range(count):
        x = torch.randn(3, 4, width, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [param.detach().clone() for param in model.parameters()]
