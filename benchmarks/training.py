"""One training run, or several that differ only in their seed and train side by side."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.decoder import Decoder, Shape
from benchmarks.optimizers import build
from benchmarks.text import Text

POINTS = 10
"""Of the validation curve."""


@dataclass(frozen=True)
class Setting:
    """What all runs of a study have in common. ``start`` names the weights that they go on from."""

    shape: Shape
    steps: int = 600
    batch: int = 16
    val_windows: int = 256
    bf16: bool = False
    start: str | None = None


@dataclass(frozen=True)
class Run:
    """One run: everything that its result depends on."""

    optimizer: dict[str, Any]
    lr: float
    seed: int
    setting: Setting
    text: str

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Device:
    """Where and how to train: nothing that a result should depend on."""

    type: str = "cpu"
    compile: bool = False
    graph: bool = True
    """Record forward and backward once and replay them: small models wait for kernel launches otherwise."""


class Copies:
    """One model per seed. More than one share every kernel (``torch.func.vmap``); each has parameters of its own,
    views of one buffer ``flat`` ``(copies, parameters)``, which are what an optimizer sees.
    """

    def __init__(self, setting: Setting, seeds: list[int], device: Device, start: list[Path] | None) -> None:
        self.setting, self.device, models = setting, device, []
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(Decoder(setting.shape))
        for model, path in zip(models, start or [], strict=False):
            model.load_state_dict(torch.load(path, weights_only=True))
        self.models = [model.to(device.type) for model in models]
        self.flat = torch.stack([nn.utils.parameters_to_vector(model.parameters()) for model in models]).detach()
        self.stacked, offset = {}, 0
        for name, first in models[0].named_parameters():
            part = self.flat[:, offset : offset + first.numel()].view(len(models), *first.shape)
            for model, own in zip(models, part, strict=True):
                model.get_parameter(name).data = own
            self.stacked[name] = part.requires_grad_()
            offset += first.numel()
        self.forward: Callable[[Tensor], Tensor] = self._together if len(models) > 1 else self._alone
        self.single = torch.compile(models[0]) if device.compile else models[0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for index, model in enumerate(self.models):
            for name, param in model.named_parameters():
                yield f"copy{index}.{name}", param

    def losses(self, windows: Tensor) -> Tensor:
        """Mean loss of each copy, in nats per byte, on its ``windows`` ``(copies, batch, context + 1)``."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.bf16):
            logits = self.forward(windows[..., :-1])
        targets = windows[..., 1:].flatten(1)
        each = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return each.view_as(targets).mean(dim=1)

    def _alone(self, tokens: Tensor) -> Tensor:
        model = self.single if torch.is_grad_enabled() else self.models[0]  # compiled for one batch size
        return model(tokens[0]).unsqueeze(0)

    def _together(self, tokens: Tensor) -> Tensor:
        def one(params: dict[str, Tensor], own: Tensor) -> Tensor:
            return torch.func.functional_call(self.models[0], params, (own,))

        with sdpa_kernel(SDPBackend.MATH):  # fused kernels do not know under vmap that a backward follows
            return torch.func.vmap(one)(self.stacked, tokens)

    def backward(self, windows: Tensor) -> None:
        leaves = self.stacked.values() if len(self.models) > 1 else self.models[0].parameters()
        for leaf in leaves:
            leaf.grad = None
        self.losses(windows).sum().backward()

    def share_gradients(self) -> None:
        """Give every copy its part of the stacked gradients."""
        if len(self.models) > 1:
            for index, model in enumerate(self.models):
                for name, param in model.named_parameters():
                    param.grad = self.stacked[name].grad[index]  # type: ignore[index]

    def recorded(self, windows: Tensor) -> Callable[[], None]:
        """Forward and backward on whatever ``windows`` then holds, as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.backward(windows)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for param in (*self.stacked.values(), *self.models[0].parameters()):
            param.grad = None
        with torch.cuda.graph(graph):
            self.losses(windows).sum().backward()
        self.share_gradients()  # once: a replay writes into the same tensors
        return graph.replay


def train(
    runs: list[Run],
    text: Text,
    device: Device,
    deadline: float = math.inf,
    start: list[Path] | None = None,
    save: list[Path] | None = None,
) -> list[dict[str, Any]] | None:
    """Train runs that differ only in their seed.

    Args:
        deadline: of ``time.time()``; a run that is not done by then is given up.
        start: weights to go on from, one file per run.
        save: files for the trained weights.

    Returns:
        One result per run; None if the deadline came first.
    """
    began, setting, lr = time.time(), runs[0].setting, runs[0].lr
    seeds = [run.seed for run in runs]
    copies = Copies(setting, seeds, device, start)
    optimizer = build(runs[0].optimizer, copies.named_parameters(), copies.models[0], lr)
    data, val = text.train.to(device.type), text.val.to(device.type)
    starts = torch.stack([batch_starts(len(data), setting, seed) for seed in seeds]).to(device.type)
    span = torch.arange(setting.shape.context + 1, device=device.type)
    windows = data[starts[:, 0, :, None] + span].long()
    replay = copies.recorded(windows) if device.type == "cuda" and device.graph and not device.compile else None

    before, largest = copies.flat.clone(), torch.zeros(len(runs), device=device.type)
    points = {round(setting.steps * (i + 1) / POINTS) for i in range(POINTS)}
    curve: list[tuple[int, list[float]]] = []
    for step in range(setting.steps):
        now = lr * schedule(step, setting.steps)
        for group in optimizer.param_groups:
            group["lr"] = now
        windows.copy_(data[starts[:, step, :, None] + span])
        if replay is not None:
            replay()
        else:
            copies.backward(windows)
            copies.share_gradients()
        optimizer.step()
        moved = before.sub_(copies.flat).abs_().amax(dim=1) / now
        largest = torch.maximum(largest, moved)
        before.copy_(copies.flat)
        if step + 1 in points:
            curve.append((step + 1, validate(copies, val)))
            if time.time() > deadline:
                return None
            if not any(map(math.isfinite, curve[-1][1])):
                break
    for model, path in zip(copies.models, save or [], strict=False):
        torch.save(model.state_dict(), path)
    seconds = (time.time() - began) / len(runs)
    return [result(i, curve, float(largest[i]), seconds, setting.shape.vocab) for i in range(len(runs))]


def result(index: int, curve: list[tuple[int, list[float]]], largest: float, seconds: float, vocab: int) -> dict:
    """What is kept of a run. ``diverged``: not finite, or worse than guessing."""
    own = [(step, losses[index]) for step, losses in curve]
    finite = [loss if math.isfinite(loss) else None for _, loss in own]
    final = finite[-1]
    return {
        "val_loss": final,
        "curve": [[step, loss and round(loss, 4)] for (step, _), loss in zip(own, finite, strict=True)],
        "max_update": largest if math.isfinite(largest) else None,
        "diverged": final is None or final > math.log(vocab),
        "seconds": round(seconds, 2),
    }


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth, as a share of the learning rate."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup - 1))


def batch_starts(length: int, setting: Setting, seed: int) -> Tensor:
    """Where each window begins: ``(steps, batch)``, a function of the seed alone."""
    order = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(length - setting.shape.context, (setting.steps, setting.batch), generator=order)


@torch.no_grad()
def validate(copies: Copies, val: Tensor) -> list[float]:
    """Loss of every copy on the same evenly spaced windows of the validation text."""
    setting = copies.setting
    span = torch.arange(setting.shape.context + 1, device=val.device)
    starts = torch.linspace(0, len(val) - len(span), setting.val_windows, dtype=torch.float64).long().to(val.device)
    total = torch.zeros(len(copies.models), device=val.device)
    for part in starts.split(4 * setting.batch):
        windows = val[part[:, None] + span].long().expand(len(copies.models), -1, -1)
        total += copies.losses(windows) * len(part)
    return (total / len(starts)).tolist()
