"""The steps that parameters have taken, as the state holds them: one tensor for each."""

from collections.abc import MutableMapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.sharding.find import has_values


class StepCounters:
    """Counts steps of states that are counted together time and again.

    Their entries ``step`` become views of one tensor, because an operation on each of hundreds of numbers costs the
    host more than what a GPU's step leaves it.
    """

    def __init__(self) -> None:
        self._all = torch.empty(0)
        self._views: tuple[Tensor, ...] = ()

    def count(self, states: Sequence[MutableMapping[str, Any]]) -> list[int]:
        """One more step for each of ``states``; their numbers."""
        held = [state["step"] for state in states]
        if len(held) == 1 or not has_values(held[0]):  # inside backward; under FakeTensorMode only scalars are known
            for number in held:
                number += 1
            return [int(number) for number in held]
        if len(held) != len(self._views) or not all(map(is_, held, self._views)):
            self._all = torch.stack(held)
            self._views = self._all.unbind()
            for state, view in zip(states, self._views, strict=True):
                state["step"] = view
        self._all += 1
        return [int(number) for number in self._all.tolist()]
