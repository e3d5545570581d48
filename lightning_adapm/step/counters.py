"""Counters of the steps that parameters have taken: a view of one tensor for each parameter."""

from collections.abc import MutableMapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch

from lightning_adapm.moments.batches import Stacked
from lightning_adapm.sharding.find import has_values

_STEP = itemgetter("step")


def count_step(
    states: Sequence[MutableMapping[str, Any]], known: Stacked | None = None
) -> tuple[list[int], Stacked | None]:
    """Count one more step for each of ``states``.

    Their entries ``step`` become parts of one tensor, because operations on hundreds of numbers would cost the host
    more time than a GPU's step takes.

    Args:
        states: States of parameters.
        known: Their counters, as far as they are known.

    Returns:
        The numbers, and the counters: ``known`` if the states still have these; None if each has one of its own.
    """
    held = list(map(_STEP, states))
    if len(held) == 1 or not has_values(held[0]):  # inside backward; under FakeTensorMode only scalars are known
        for number in held:
            number += 1
        return [int(number) for number in held], None
    if known is None or len(held) != len(known) or not all(map(is_, held, known)):
        known = Stacked(torch.stack(held))
        for state, number in zip(states, known, strict=True):
            state["step"] = number
    known.whole.add_(1)
    return known.whole.int().tolist(), known
