"""Models that are no transformers: a recurrent language model and a small residual network on images made here."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies.text import NO_TARGET, Text


@dataclass(frozen=True)
class Recurrent:
    """Sizes of an LSTM language model."""

    layers: int
    width: int
    context: int
    vocab: int = 256
    words: ClassVar[str] = "An LSTM language model"
    unit: ClassVar[str] = "byte"

    def build(self) -> nn.Module:
        return RecurrentLM(self)

    def __str__(self) -> str:
        return f"{self.words}: {self.layers} layers, width {self.width}"


class Cell(nn.Module):
    """One LSTM layer (Hochreiter and Schmidhuber 1997), of operations that vmap knows; weights as in ``nn.LSTM``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(4 * width, width) * width**-0.5)
        self.weight_hh = nn.Parameter(torch.randn(4 * width, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, time, width)`` to the same shape."""
        fed = F.linear(x, self.weight_ih, self.bias)
        hidden = memory = torch.zeros_like(x[:, 0])
        outputs = []
        for now in fed.unbind(1):
            keep, write, new, show = (now + F.linear(hidden, self.weight_hh)).chunk(4, dim=-1)
            memory = (keep + 1).sigmoid() * memory + write.sigmoid() * new.tanh()
            hidden = show.sigmoid() * memory.tanh()
            outputs.append(hidden)
        return torch.stack(outputs, dim=1)


class RecurrentLM(nn.Module):
    """Map tokens ``(batch, time)`` to logits ``(batch * time, vocab)``."""

    def __init__(self, shape: Recurrent) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocab, shape.width)
        self.cells = nn.ModuleList(Cell(shape.width) for _ in range(shape.layers))
        self.lm_head = nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        for cell in self.cells:
            x = cell(x)
        return self.lm_head(x).flatten(0, 1)


@dataclass(frozen=True)
class Images:
    """Sizes of a residual network for square images of ``side`` pixels; ``context`` is the bytes of one."""

    blocks: int
    width: int
    side: int = 16
    vocab: int = 10
    words: ClassVar[str] = "A residual network with group norms"
    unit: ClassVar[str] = "image"

    @property
    def context(self) -> int:
        return 3 * self.side**2

    def build(self) -> nn.Module:
        return ResNet(self)

    def __str__(self) -> str:
        return f"{self.words}: {self.blocks} blocks in each of 3 stages, the first of width {self.width}"


class ResidualBlock(nn.Module):
    """Two convolutions with group norms (batch norms keep averages that copies trained together would share)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm_1 = nn.GroupNorm(8, outputs)
        self.conv_2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm_2(self.conv_2(F.relu(self.norm_1(self.conv_1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """Map images as bytes ``(batch, 3 * side**2)`` to logits ``(batch, classes)``."""

    def __init__(self, shape: Images) -> None:
        super().__init__()
        self.side = shape.side
        widths = [shape.width * 2**stage for stage in range(3)]
        self.stem = nn.Conv2d(3, shape.width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential()
        for before, after in zip([shape.width, *widths], widths, strict=False):
            for index in range(shape.blocks):
                inputs = before if index == 0 else after
                self.blocks.append(ResidualBlock(inputs, after, stride=2 if after > inputs else 1))
        self.classifier = nn.Linear(widths[-1], shape.vocab)

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.unflatten(1, (3, self.side, self.side)).to(self.stem.weight.dtype) / 127.5 - 1
        return self.classifier(self.blocks(self.stem(x)).mean(dim=(2, 3)))


def made_images(shape: Images, train: int = 20_000, val: int = 2_000) -> Text:
    """Images with a known class, made here: not photographs, and no benchmark of vision.

    Each class is two smooth random patterns; an image is one of them, moved by up to a quarter of its side, with a
    smooth pattern of no class and with noise over it. As records of pixels and a label, of which the label alone is a
    target.
    """
    random = torch.Generator().manual_seed(0)
    side, count = shape.side, train + val

    def smooth(number: int) -> Tensor:
        coarse = torch.randn(number, 3, 4, 4, generator=random)
        return F.interpolate(coarse, size=(side, side), mode="bicubic")

    patterns = smooth(2 * shape.vocab)
    labels = torch.randint(shape.vocab, (count,), generator=random)
    which = labels * 2 + torch.randint(2, (count,), generator=random)
    moves = torch.randint(-(side // 4), side // 4 + 1, (count, 2), generator=random)
    rows, columns = ((torch.arange(side) + moves[:, axis, None]) % side for axis in (0, 1))
    moved = patterns[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    noisy = moved + smooth(count) + torch.randn(count, 3, side, side, generator=random)
    pixels = (noisy * 32 + 128).round().clamp(0, 255).flatten(1).to(torch.int16)
    records = torch.cat([pixels + NO_TARGET, labels[:, None].to(torch.int16)], dim=1)
    digest = hashlib.sha256(records.numpy().tobytes()).hexdigest()[:8]
    starts = tuple(torch.arange(number) * records.shape[1] for number in (train, val))
    parts = records[:train].flatten(), records[train:].flatten()
    return Text(f"images made here ({train} and {val}, {digest})", *parts, (starts[0], starts[1]))
