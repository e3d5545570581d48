"""Parameters that move in a step, with their gradients and states."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.step.parts import Part


class Work(NamedTuple):
    """Parameters that move in a step under the options of one group, as this process holds them."""

    group: Mapping[str, Any]
    parts: Sequence[tuple[Part, ...]]
    """Parts of each parameter. The lists below have one entry for each parameter, too."""
    held: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[dict[str, Any]]
    counts: Sequence[int] = ()
    """Numbers of the parameters' steps, once counted."""
    unmoved: object = None
    """Token shared by steps whose parameters and states lie at the same addresses, and whose gradients have the same
    dtypes and strides; None if that was not checked.
    """

    @classmethod
    def of(cls, group: Mapping[str, Any], moving: Iterable[tuple[tuple[Part, ...], Tensor, Tensor, Any]]) -> "Work":
        """Collect the parameters of which any process holds an element, with their gradients and states."""
        columns = zip(*(each for each in moving if each[1].numel() or each[0][0].layout is not None), strict=True)
        return cls(group, *(tuple(columns) or ((), (), (), ())))

    @property
    def first(self) -> Tensor:
        """The first parameter, which identifies those that move together in every step."""
        return self.parts[0][0].param

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return self.held[0].device

    def bound(self) -> Iterator[Part]:
        """Yield the parts, bound to the memory of their parameters and states until they are released."""
        for parts, held, state in zip(self.parts, self.held, self.states, strict=True):
            for part in parts:
                part.bind(held, state)
                yield part

    def settle(self) -> None:
        """Move scalars of the states to the devices of the parameters.

        ZeroRedundancyOptimizer loads all scalars to the CPU, where torch's optimizers have only counters of steps.
        """
        for parts, held, state in zip(self.parts, self.held, self.states, strict=True):
            for part in parts:
                for key, entry in part.entries.items():
                    name = part.prefix + key
                    if entry.shape is not None and not entry.shape and isinstance(state.get(name), Tensor):
                        state[name] = state[name].to(held.device)
