"""Counters of the steps that parameters have taken, one tensor for each."""

from collections.abc import Mapping, MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.sharding.find import has_values


class StepCounters:
    """Counter of the steps of states that are often counted together.

    Their entries ``step`` become views of one tensor, because operations on hundreds of numbers would cost the host
    more time than a GPU's step takes.
    """

    def __init__(self) -> None:
        self._all = torch.empty(0)
        self._views: tuple[Tensor, ...] = ()

    def have_counted(self, states: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these very states were counted together last time: none of them has been replaced since."""
        return len(states) == len(self._views) and all(map(is_, [state["step"] for state in states], self._views))

    def count(self, states: Sequence[MutableMapping[str, Any]]) -> list[int]:
        """Count one more step for each of ``states``, and return the numbers."""
        held = [state["step"] for state in states]
        if len(held) == 1 or not has_values(held[0]):  # inside backward; under FakeTensorMode only scalars are known
            for number in held:
                number += 1
            return [int(number) for number in held]
        if not self.have_counted(states):
            self._all = torch.stack(held)
            self._views = self._all.unbind()
            for state, view in zip(states, self._views, strict=True):
                state["step"] = view
        self._all += 1
        return [int(number) for number in self._all.tolist()]
