"""Parameters that move in a step, with their gradients and states."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.step.parts import Part


class Work(NamedTuple):
    """Parameters that move in a step by the options of one group, as this process holds them."""

    group: Mapping[str, Any]
    parts: Sequence[tuple[Part, ...]]
    """Parts of each parameter; the lists below have an entry for each parameter, too."""
    held: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[dict[str, Any]]
    counts: Sequence[int] = ()
    """Numbers of their steps, once they are counted."""
    unmoved: object = None
    """Token of the steps whose parameters and states lie in the same places, with gradients of the same kinds; None
    where that was not found out.
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
        """Let the parts find themselves in the parameters and their states, until they are released."""
        for parts, held, state in zip(self.parts, self.held, self.states, strict=True):
            for part in parts:
                part.bind(held, state)
                yield part

    def settle(self) -> None:
        """Bring scalars of the states to the devices of the parameters.

        ZeroRedundancyOptimizer loads all scalars to the CPU, where torch's optimizers have only counters of steps.
        """
        for parts, held, state in zip(self.parts, self.held, self.states, strict=True):
            for part in parts:
                for key, entry in part.entries.items():
                    name = part.prefix + key
                    if entry.shape is not None and not entry.shape and isinstance(state.get(name), Tensor):
                        state[name] = state[name].to(held.device)
