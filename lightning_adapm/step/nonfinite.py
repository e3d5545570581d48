"""What a step descends along: gradients in float32 at least, and zero where they are not finite."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adapm.sharding.reduction import all_reduce
from lightning_adapm.step.parts import Task


class NonFiniteGradients:
    """Counts, per piece, the steps whose gradient held an infinity or a NaN; such a gradient is taken as zero.

    Counted on the device the gradient is on, so that a step waits for nothing.
    """

    def __init__(self) -> None:
        self._counts: dict[tuple[str, ...], Tensor] = {}
        self._agreed: dict[str, Tensor] = {}

    def steps(self) -> dict[str, int]:
        """Names with their number of steps, where there were any; waits for the device."""
        steps: Counter[str] = Counter()
        for names, counts in self._counts.items():
            steps.update(dict(zip(names, counts.tolist(), strict=True)))
        return {name: number for name, number in steps.items() if number}

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
        on_device = exact[0].device.type != "cpu"
        if on_device and exact[0].dim() and all(grad.shape == exact[0].shape for grad in exact):
            exact = self._zeroed(tasks, torch.stack(exact))
        else:
            finite = self.agreed_on(tasks)
            finite = _finite(exact) if finite is None else finite
            if on_device or not finite.all():  # on a CPU, asking costs nothing
                self.count(tasks, (~finite).to(torch.int32))
                exact = [torch.where(fine, grad, 0.0) for fine, grad in zip(finite.unbind(), exact, strict=True)]
        return [task._replace(grad=grad) for task, grad in zip(tasks, exact, strict=True)]

    def _zeroed(self, tasks: list[Task], grads: Tensor) -> list[Tensor]:
        """Gradients as one tensor, by a few kernels for all of them."""
        finite = self.agreed_on(tasks)
        if finite is None:
            finite = grads.sum(dim=-1).view(len(tasks), -1).isfinite().all(dim=-1)
        self.count(tasks, (~finite).to(torch.int32))
        return list(grads.masked_fill_(~finite.view(-1, *(1,) * (grads.dim() - 1)), 0.0).unbind())

    def agreed_on(self, tasks: list[Task]) -> Tensor | None:
        """Flags ``(tasks,)``: finite, as far as processes have agreed on it."""
        if _name(tasks[0]) not in self._agreed:
            return None
        return torch.stack([self._agreed[_name(task)] for task in tasks])

    def count(self, tasks: list[Task], flaws: Tensor) -> None:
        """Add a step to those whose number in ``flaws`` ``(tasks,)`` is 1, not 0."""
        names = tuple(map(_name, tasks))
        if names in self._counts:
            self._counts[names] += flaws
        else:
            self._counts[names] = flaws.clone()


def _name(task: Task) -> str:
    return task.name if task.piece.whole else f"{task.name} ({task.piece.role})"


def _finite(grads: list[Tensor]) -> Tensor:
    """For each gradient, all of one shape, whether it is finite.

    An infinity or a NaN reaches the sum of its row. Sums of rows, not of everything: those of large but finite
    gradients overflow.
    """
    exact = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    return torch.stack([grad.sum(dim=-1, dtype=exact).flatten() for grad in grads]).isfinite().all(dim=-1)
