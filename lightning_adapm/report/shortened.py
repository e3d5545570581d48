"""Memory of a model with many equal blocks, from a step of a few of them and what every further block adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_adapm.optim.in_backward import Waiting
from lightning_adapm.report.allocations import AllocationTracker

_FEW = 3
"""Blocks that run where gradients stay: the first, the last, and one that stands for all between them."""


class Shortened:
    """Within the context, leave a model only some of its blocks, if they are alike.

    The step has a section before the backward pass, and one for each block in it, each with its own peak. In the first
    of them, every missing block would hold its activations; in the last ones, its gradients. Between them, memory rises
    or falls evenly.

    Args:
        blocks: Blocks that pass one tensor on; None for a model that stays as it is.
        tracker: Tracker of the allocations of the step.
        waiting: Gradients that wait for each other where parameters move in backward; None elsewhere.
    """

    def __init__(self, blocks: nn.ModuleList | None, tracker: AllocationTracker, waiting: Waiting | None) -> None:
        self._blocks = nn.ModuleList() if blocks is None else blocks
        self._tracker, self._waiting = tracker, waiting
        self._missing: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._forward: list[Counter[str]] = []
        self._backward: list[Counter[str]] = []
        self._sections: list[Counter[str]] = []

    def __enter__(self) -> Shortened:
        few = _FEW
        if self._waiting is not None and len(self._blocks):  # twice until all that wait have moved
            size = sum(param.nbytes for param in self._blocks[0].parameters() if param.requires_grad)
            few = 2 + 2 * -(-self._waiting.bound // max(1, size))
        if len(self._blocks) > few and _alike(self._blocks) and _trained(self._blocks[0]):
            self._missing = list(self._blocks[few:])
            del self._blocks[few:]
            self._handles = [block.register_forward_hook(self._passed) for block in self._blocks]
        return self

    def __exit__(self, *_: Any) -> None:
        self._sections.append(self._tracker.end_section())
        for handle in self._handles:
            handle.remove()
        self._blocks.extend(self._missing)

    def _passed(self, block: nn.Module, inputs: Any, out: Tensor) -> None:
        """Hook of a block's forward pass."""
        self._forward.append(self._tracker.alive())
        out.register_hook(self._reached)

    def _reached(self, grad: Tensor) -> None:
        """Hook at the start of a block's backward pass."""
        self._sections.append(self._tracker.end_section())
        self._backward.append(self._tracker.alive())

    def peak(self) -> Counter[str]:
        """Bytes by category at the moment when the whole model holds most."""
        if not self._missing:
            return self._sections[-1]
        activations = _difference(self._forward[-1], self._forward[-2])
        gradients: Counter[str] = Counter()
        if self._waiting is None:
            gradients = _sum(activations, _difference(self._backward[-1], self._backward[-2]))
        number = len(self._missing)
        candidates = [
            *(_sum(section, activations, number) for section in self._sections[:-1]),
            *(_sum(section, gradients, number) for section in self._sections[2:]),
        ]
        return max(candidates, key=Counter.total)


def _alike(blocks: Iterable[nn.Module]) -> bool:
    """Whether all blocks have the same parameters, of which the same are trained."""
    kinds = {
        (type(block), tuple((name, param.shape, param.requires_grad) for name, param in block.named_parameters()))
        for block in blocks
    }
    return len(kinds) == 1


def _trained(block: nn.Module) -> bool:
    return any(param.requires_grad for param in block.parameters())


def _difference(one: Counter[str], other: Counter[str]) -> Counter[str]:
    return _sum(one, other, -1)


def _sum(one: Counter[str], other: Counter[str], times: int = 1) -> Counter[str]:
    """Sum of bytes by category; the summands may be negative."""
    return Counter({key: one[key] + times * other[key] for key in {*one, *other}})
