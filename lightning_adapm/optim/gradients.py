"""What a step descends along: gradients in float32 at least, and zero where they are not finite."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adapm.optim.tasks import Task
from lightning_adapm.sharding import all_reduce


class NonFiniteGradients:
    """Counts, per piece, the steps whose gradient held an infinity or a NaN; such a gradient is taken as zero.

    Counted on the device the gradient is on, so that a step waits for nothing.
    """

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}
        self._agreed: dict[str, Tensor] = {}

    def read(self) -> dict[str, int]:
        """Names with their number of steps, where there were any; waits for the device."""
        return {name: steps for name, count in self._counts.items() if (steps := int(count))}

    def agree(self, tasks: Iterable[Task]) -> None:
        """Let the processes that hold parts of a piece agree on whether its gradient is finite, in one collective.

        A piece is told by its name: the processes hold the same pieces, if only nothing of some.
        """
        self._agreed = {}
        by_group: dict[Any, list[Task]] = defaultdict(list)
        for task in tasks:
            if task.layout is not None and len(task.layout.spans) > 1:
                by_group[task.layout.group].append(task)
        for group, together in by_group.items():
            flags = torch.stack([_finite([task.taken().grad])[0] for task in together]).to(torch.int32)
            all_reduce(flags, group, dist.ReduceOp.MIN)
            self._agreed.update(zip(map(_name, together), (flags != 0).unbind(), strict=True))

    def replace(self, tasks: list[Task], maximize: bool) -> list[Task]:
        """The tasks with the gradients to descend along: tasks of one shape, dtype and device."""
        exact = [task.grad if task.grad.dtype == torch.float64 else task.grad.float() for task in tasks]
        if maximize:
            exact = list(torch._foreach_neg(exact))
        if _name(tasks[0]) in self._agreed:
            finite = torch.stack([self._agreed[_name(task)] for task in tasks])
        else:
            finite = _finite(exact)
        if finite.device.type != "cpu" or not finite.all():  # on a CPU, asking costs nothing
            self._count(tasks, ~finite)
            exact = [torch.where(fine, grad, 0.0) for fine, grad in zip(finite.unbind(), exact, strict=True)]
        return [task._replace(grad=grad) for task, grad in zip(tasks, exact, strict=True)]

    def _count(self, tasks: list[Task], found: Tensor) -> None:
        names = [_name(task) for task in tasks]
        for name in names:
            if name not in self._counts:
                self._counts[name] = torch.zeros((), dtype=torch.int32, device=found.device)
        torch._foreach_add_([self._counts[name] for name in names], list(found.to(torch.int32).unbind()))


def _name(task: Task) -> str:
    return task.name if task.piece.whole else f"{task.name} ({task.piece.role})"


def _finite(grads: list[Tensor]) -> Tensor:
    """For each gradient, all of one shape, whether it is finite.

    An infinity or a NaN reaches the sum of its row. Sums of rows, not of everything: those of large but finite
    gradients overflow.
    """
    exact = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    return torch.stack([grad.sum(dim=-1, dtype=exact).flatten() for grad in grads]).isfinite().all(dim=-1)
