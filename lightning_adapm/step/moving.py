"""A parameter that moves in a step."""

from typing import Any, NamedTuple

from torch import Tensor

from lightning_adapm.step.parts import Part


class Moving(NamedTuple):
    """A parameter that moves in a step, as this process holds it."""

    parts: tuple[Part, ...]
    held: Tensor
    grad: Tensor
    state: dict[str, Any]

    @property
    def is_something(self) -> bool:
        """Whether any process holds an element of it."""
        return self.held.numel() > 0 or self.parts[0].layout is not None

    def settle(self) -> None:
        """Bring scalars of the state to the device of the parameter.

        ZeroRedundancyOptimizer loads all scalars to the CPU, where torch's optimizers have only counters of steps.
        """
        for part in self.parts:
            for key, entry in part.entries.items():
                name = part.prefix + key
                if entry.shape is not None and not entry.shape and isinstance(self.state.get(name), Tensor):
                    self.state[name] = self.state[name].to(self.held.device)

    def bind(self) -> "Moving":
        """Let the parts find themselves in the parameter and its state, until they are released."""
        for part in self.parts:
            part.bind(self.held, self.state)
        return self
