"""Pooling of figures over pieces and processes, to the few that are logged."""

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.report.diagnostics import Reading, role_label
from lightning_adapm.roles.context import normalize

_LAYER = re.compile(r"(?P<stack>(?:[^.]*[^.\d][^.]*\.)*)(?P<number>\d+)\.")


class Pool(Metric):
    """Weighted mean and maximum of named figures, over pieces and over processes.

    All figures share one vector per quantity, so that a synchronization costs three collectives.

    Args:
        names: Names of the figures, the same on every process.
        dtype: Dtype of the sums; float64 keeps counts of bytes exact.
    """

    full_state_update = False
    total: Tensor
    weight: Tensor
    largest: Tensor

    def __init__(self, names: Iterable[str], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.places = {name: place for place, name in enumerate(names)}
        zeros = torch.zeros(len(self.places), dtype=dtype)
        self.add_state("total", zeros.clone(), "sum")
        self.add_state("weight", zeros.clone(), "sum")
        self.add_state("largest", torch.full_like(zeros, -torch.inf), "max")

    def update(self, figures: Iterable[tuple[str, float, float]]) -> None:
        """Add figures, each a name, a value and a weight."""
        total, weight, largest = ([start] * len(self.places) for start in (0.0, 0.0, -math.inf))
        for name, value, share in figures:
            place = self.places[name]
            total[place] += value * share
            weight[place] += share
            if not (value <= largest[place] or math.isnan(largest[place])):  # a NaN stays
                largest[place] = value
        self.total += self.total.new_tensor(total)
        self.weight += self.weight.new_tensor(weight)
        self.largest = torch.maximum(self.largest, self.largest.new_tensor(largest))

    def compute(self) -> dict[str, tuple[float, float]]:
        """Mean and maximum of every figure that some process has added."""
        columns = ((self.total / self.weight).tolist(), self.largest.tolist(), self.weight.tolist())
        return {
            name: (mean, most) for name, mean, most, weight in zip(self.places, *columns, strict=True) if weight > 0
        }


class ResidualFigures:
    """Names and values of the figures by role and by layer, from a step's readings.

    Args:
        optimizer: Optimizer whose parameters determine the names, the same on every process.
    """

    def __init__(self, optimizer: RoleOptimizer) -> None:
        low_rank: list[tuple[str, str]] = []
        orthogonal: list[str] = []
        all_roles: list[str] = []
        for group in optimizer.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                for part in optimizer.parts(param):
                    all_roles.append(role_label(part.piece.role))
                    if part.first.has_basis:
                        low_rank.append((name, role_label(part.piece.role)))
                    if part.second.whole_matrices:
                        orthogonal.append(role_label(part.piece.role))
        self.layers = layer_labels(name for name, _ in low_rank)
        numbered_first = sorted(dict.fromkeys(self.layers.values()), key=lambda label: not label[-1].isdigit())
        self.names = ["nonfinite_gradients", *(f"norm_by_layer/{label}" for label in numbered_first)]
        low_rank_roles = [role for _, role in low_rank]
        kinds = {"norm": low_rank_roles, "stationarity": low_rank_roles, "update_max": all_roles, "clamped": all_roles}
        kinds |= {"orthogonality": orthogonal} if orthogonal else {}
        self.names += [f"{kind}/{role}" for kind, roles in kinds.items() for role in dict.fromkeys(["all", *roles])]

    def figures(self, readings: Iterable[Reading]) -> Iterable[tuple[str, float, float]]:
        """Yield name, value and weight of each figure, for a :class:`Pool` of :attr:`names`."""
        for reading in readings:
            for kind, value in reading.figures.items():
                weight = reading.entries if kind == "clamped" else 1.0
                yield f"{kind}/all", value, weight
                yield f"{kind}/{reading.role}", value, weight
                if kind == "norm":
                    yield f"norm_by_layer/{self.layers[reading.name]}", value, weight

    @staticmethod
    def logged(pooled: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Rename pooled figures to the names in the logs."""
        logged: dict[str, float] = {}
        for name, (mean, largest) in pooled.items():
            kind, _, rest = name.partition("/")
            if kind == "norm":
                logged |= {f"norm_mean/{rest}": mean, f"norm_max/{rest}": largest}
            else:
                logged[name] = largest if kind == "update_max" else mean
        return logged


def layer_labels(names: Iterable[str]) -> dict[str, str]:
    """Label the layer of each parameter by its number, with its path where there are several stacks of layers.

    The label of a parameter outside the layers is its own name without ``.weight``.
    """
    found = {name: _LAYER.match(normalize(name)) for name in names}
    one_stack = len({match["stack"] for match in found.values() if match}) == 1
    labels = {}
    for name, match in found.items():
        if match is None:
            labels[name] = normalize(name).removesuffix(".weight")
        else:
            labels[name] = match["number"] if one_stack else match["stack"] + match["number"]
    return labels
