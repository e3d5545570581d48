"""Counters of the steps that parameters have taken, one tensor for each."""

from collections.abc import MutableMapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.sharding.find import has_values

_STEP = itemgetter("step")


class StepCounters:
    """Counter of the steps of states that are often counted together.

    Their entries ``step`` become views of one tensor, because operations on hundreds of numbers would cost the host
    more time than a GPU's step takes.
    """

    def __init__(self) -> None:
        self._all = torch.empty(0)
        self._views: tuple[Tensor, ...] = ()

    def count(self, states: Sequence[MutableMapping[str, Any]]) -> tuple[list[int], bool]:
        """Count one more step for each of ``states``.

        Returns:
            The numbers, and whether these very states were counted together last time: none has been replaced since.
        """
        held = list(map(_STEP, states))
        if len(held) == 1 or not has_values(held[0]):  # inside backward; under FakeTensorMode only scalars are known
            for number in held:
                number += 1
            return [int(number) for number in held], False
        as_before = len(held) == len(self._views) and all(map(is_, held, self._views))
        if not as_before:
            self._all = torch.stack(held)
            self._views = self._all.unbind()
            for state, view in zip(states, self._views, strict=True):
                state["step"] = view
        self._all += 1
        return self._all.int().tolist(), as_before
