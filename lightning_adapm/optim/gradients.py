"""What a step descends along: gradients in float32 at least, and zero where they are not finite."""

import torch
from torch import Tensor

from lightning_adapm.optim.tasks import Task


class NonFiniteGradients:
    """Counts, per piece, the steps whose gradient held an infinity or a NaN; such a gradient is taken as zero.

    Counted on the device the gradient is on, so that a step waits for nothing.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def read(self) -> dict[str, int]:
        """Names with their number of steps, where there were any; waits for the device."""
        return {name: steps for name, count in self._counts.items() if (steps := int(count))}

    def replace(self, tasks: list[Task], maximize: bool) -> list[Task]:
        """The tasks with the gradients to descend along: tasks of one shape, dtype and device."""
        exact = [task.grad if task.grad.dtype == torch.float64 else task.grad.float() for task in tasks]
        if maximize:
            exact = list(torch._foreach_neg(exact))
        # An infinity or a NaN reaches the sum of its row. Sums of rows, not of everything: those of large but finite
        # gradients overflow.
        finite = torch.stack([grad.sum(dim=-1).flatten() for grad in exact]).isfinite().all(dim=-1)
        if finite.device.type != "cpu" or not finite.all():  # on a CPU, asking costs nothing
            self._count(tasks, ~finite)
            exact = [torch.where(fine, grad, 0.0) for fine, grad in zip(finite.unbind(), exact, strict=True)]
        return [task._replace(grad=grad) for task, grad in zip(tasks, exact, strict=True)]

    def _count(self, tasks: list[Task], found: Tensor) -> None:
        names = [task.name if task.piece.whole else f"{task.name} ({task.piece.role})" for task in tasks]
        for name in names:
            if name not in self._counts:
                self._counts[name] = torch.zeros((), dtype=torch.int32, device=found.device)
        torch._foreach_add_([self._counts[name] for name in names], list(found.to(torch.int32).unbind()))
