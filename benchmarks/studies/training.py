"""One training run, or several that differ only in their seed and train side by side."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.costs.memory import state_bytes
from benchmarks.studies.copies import Copies
from benchmarks.studies.observing import Log
from benchmarks.studies.optimizers import Parameters, build
from benchmarks.studies.setting import Device, Run, Setting
from benchmarks.studies.text import Text


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
        deadline: By ``time.time()``. A run that is not done by then is given up.
        start: Files of weights to start from, one per run.
        save: Files for the trained weights.

    Returns:
        One result per run; None if the deadline came first. ``state`` is the bytes of the optimizer's state relative
        to AdamW's in float32.
    """
    began, setting, lr = time.time(), runs[0].setting, runs[0].lr
    seeds = [run.seed for run in runs]
    copies = Copies(setting, seeds, device, start)
    optimizer = build(runs[0].optimizer, Parameters.of(copies.models[0], copies.named_parameters()), lr)
    data = text.train.to(device.type)
    starts = torch.stack([batch_starts(text, setting, seed) for seed in seeds]).to(device.type)
    span = torch.arange(setting.shape.context + 1, device=device.type)
    windows = data[starts[:, 0, :, None] + span].long()
    replay = copies.recorded(windows) if device.type == "cuda" and device.graph and not device.compile else None

    before, largest = copies.flat.clone(), torch.zeros(len(runs), device=device.type)
    moved = torch.compile(farthest, dynamic=False) if device.compile else farthest
    log, curve, clock = Log(len(runs)), Curve(copies, text), Clock(device.type)
    for step in range(setting.steps):
        now = lr * schedule(step, setting.steps, setting.change)
        for group in optimizer.param_groups:
            group["lr"] = now
        windows.copy_(data[starts[:, step, :, None] + span])
        if replay is not None:
            replay()
        else:
            copies.backward(windows)
            copies.share_gradients()
        if setting.observe:
            optimizer.observer = log if step % setting.observe < 2 else None  # type: ignore[attr-defined]
        optimizer.step()
        largest = torch.maximum(largest, moved(before, copies.flat) / now)
        if log.seen and step % setting.observe == 1:
            log.take(step + 1)
        if curve.due(step + 1):
            clock.stop()
            curve.add(step + 1, clock.seconds / len(runs))
            if time.time() > deadline:
                return None
            if curve.diverged:
                break
            clock.start()
    for model, path in zip(copies.models, save or [], strict=False):
        torch.save(model.state_dict(), path)
    seconds = (time.time() - began) / len(runs)
    kept = {"state": round(state_bytes(optimizer) / (8 * copies.flat.numel()), 6)}
    results = [result(curve.of(i), float(largest[i]), seconds, setting.shape.vocab) for i in range(len(runs))]
    return [found | kept | log.of(i) for i, found in enumerate(results)]


def farthest(before: Tensor, now: Tensor) -> Tensor:
    """The largest difference in each row; ``before`` then holds ``now``."""
    found = before.sub_(now).abs_().amax(dim=1)
    before.copy_(now)
    return found


class Clock:
    """Seconds of training alone: the set-up and the validation are not in it."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, 0.0
        self.start()

    def start(self) -> None:
        self.since = time.perf_counter()

    def stop(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - self.since


class Curve:
    """Validation losses of all copies, with the step and the seconds (of the stack, by its number of copies)."""

    def __init__(self, copies: Copies, text: Text) -> None:
        self.copies, self.text, self.setting = copies, text, copies.setting
        self.val = text.val.to(copies.device.type)
        points, steps = self.setting.points, self.setting.steps
        self.at = {round(steps * (i + 1) / points) for i in range(points)}
        self.points: list[tuple[int, list[float], float]] = []

    def due(self, step: int) -> bool:
        return step in self.at

    def add(self, step: int, seconds: float) -> None:
        self.points.append((step, validate(self.copies, self.val, self.text.starts), seconds))

    @property
    def diverged(self) -> bool:
        return not any(map(math.isfinite, self.points[-1][1]))

    def of(self, index: int) -> list[tuple[int, float, float]]:
        return [(step, losses[index], seconds) for step, losses, seconds in self.points]


def result(curve: list[tuple[int, float, float]], largest: float, seconds: float, vocab: int) -> dict[str, Any]:
    """Result of a run. ``diverged``: not finite, or worse than guessing. ``curve``: steps, loss and seconds of
    training up to there.
    """
    finite = [loss if math.isfinite(loss) else None for _, loss, _ in curve]
    final = finite[-1]
    return {
        "val_loss": final,
        "curve": [
            [step, loss and round(loss, 4), round(at, 3)] for (step, _, at), loss in zip(curve, finite, strict=True)
        ],
        "max_update": largest if math.isfinite(largest) else None,
        "diverged": final is None or final > math.log(vocab),
        "seconds": round(seconds, 2),
    }


def schedule(step: int, steps: int, change: tuple[float, float] | None = None) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth, as a share of the learning rate; times the
    factor of ``change`` from its share of the steps on.
    """
    factor = change[1] if change is not None and step >= change[0] * steps else 1.0
    warmup = max(1, steps // 10)
    if step < warmup:
        return factor * (step + 1) / warmup
    return factor * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup - 1)))


def batch_starts(text: Text, setting: Setting, seed: int) -> Tensor:
    """Starts of the windows, ``(steps, batch)``, which depend on the seed and the text alone."""
    order = torch.Generator().manual_seed(1000 + seed)
    size, last = (setting.steps, setting.batch), len(text.train) - setting.shape.context
    if text.starts is None:
        return torch.randint(last, size, generator=order)
    possible = text.starts[0][text.starts[0] < last]
    return possible[torch.randint(len(possible), size, generator=order)]


@torch.no_grad()
def validate(copies: Copies, val: Tensor, starts: tuple[Tensor, Tensor] | None = None) -> list[float]:
    """Loss of every copy on the same evenly spaced windows of the validation text."""
    setting = copies.setting
    span = torch.arange(setting.shape.context + 1, device=val.device)
    possible = None if starts is None else starts[1][starts[1] <= len(val) - len(span)]
    last = len(val) - len(span) if possible is None else len(possible) - 1
    chosen = torch.linspace(0, last, setting.val_windows, dtype=torch.float64).long()
    chosen = (chosen if possible is None else possible[chosen]).to(val.device)
    total = torch.zeros(len(copies.models), device=val.device)
    # a compiled model sees no other number of windows than in training
    for part in chosen.split(setting.batch if copies.device.compile else 4 * setting.batch):
        windows = val[part[:, None] + span].long().expand(len(copies.models), -1, -1)
        total += copies.losses(windows) * len(part)
    return (total / len(chosen)).tolist()
