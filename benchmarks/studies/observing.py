"""Observation of steps by role: the size of updates and the residual of the low-rank momentum."""

import re
import statistics
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.step.parts import Part
from lightning_adapm.step.watching import Tiles

FIGURES = {
    "update_rms": "Root mean square of the update / lr",
    "residual": "Norm of the gradient outside the subspace / norm of the gradient",
    "stationarity": "Cosine between that part and the one of the step before",
}


class Log:
    """An observer for ``AdaPM.observer``. Of every role, the mean over its pieces of

    - ``update_rms``: root mean square of the update that is applied, in units of the learning rate;
    - ``residual``: norm of the gradient outside the subspace, relative to the gradient's;
    - ``stationarity``: cosine between that part and the one of the step before.

    Args:
        copies: Models that train side by side, whose parameters are named ``copy0.``, ``copy1.`` and so on.
    """

    def __init__(self, copies: int) -> None:
        self.probe = ResidualProbe()
        self.seen: list[Tensor] = []
        """Sums for each piece seen: squares of the gradient, the direction and the update; number of entries."""
        self._latest: dict[tuple[int, int], Tensor] = {}
        self.steps: list[int] = []
        self.copies: list[dict[str, dict[str, list[float | None]]]] = [{} for _ in range(copies)]

    def see_gradient(self, part: Part, grad: Tiles) -> None:
        """Begin a piece; see :class:`lightning_adapm.step.watching.Observer`."""
        self.probe.see_gradient(part, grad)
        squares = torch.stack([rows.square().sum() for _, _, rows in grad]).sum()
        sums = torch.stack([squares, *squares.new_zeros(2), squares.new_tensor(part.held_numel)])
        self._latest[part.key] = sums
        self.seen.append(sums)

    def see_update(self, part: Part, direction: Tensor, update: Tensor, clip_threshold: float | None) -> None:
        """Take in some rows of a piece; see :class:`lightning_adapm.step.watching.Observer`."""
        self.probe.see_update(part, direction, update, clip_threshold)
        applied = update if clip_threshold is None else update.clamp(-clip_threshold, clip_threshold)
        self._latest[part.key][1] += direction.square().sum()
        self._latest[part.key][2] += applied.square().sum()

    def take(self, step: int) -> None:
        """Keep what the latest of the steps seen showed; waits for the device."""
        gradient, direction, applied, number = torch.stack(self.seen).unbind(dim=1)
        tiny = torch.finfo(gradient.dtype).tiny
        own = torch.stack([(applied / number).sqrt(), (direction / gradient.clamp_min(tiny)).sqrt()], dim=1).tolist()
        readings = self.probe.read()
        self.seen = []
        found: list[dict[tuple[str, str], list[float]]] = [defaultdict(list) for _ in self.copies]
        half = len(readings) // 2  # two steps in a row: the first is there for the second's stationarity
        for reading, (rms, used) in list(zip(readings, own, strict=True))[half:]:
            copy = found[int(re.match(r"copy(\d+)\.", reading.name)[1])]  # type: ignore[index]
            copy[reading.role, "update_rms"].append(rms)
            if "norm" in reading.figures:
                copy[reading.role, "residual"].append(reading.figures["norm"] * used)
            if "stationarity" in reading.figures:
                copy[reading.role, "stationarity"].append(reading.figures["stationarity"])
        self.steps.append(step)
        for kept, copy in zip(self.copies, found, strict=True):
            for (role, figure), values in copy.items():
                kept.setdefault(role, {}).setdefault(figure, []).append(round(statistics.fmean(values), 4))

    def of(self, index: int) -> dict[str, Any]:
        """Figures for a run's result; empty without observations."""
        return {"observed": {"steps": self.steps, "roles": self.copies[index]}} if self.steps else {}
