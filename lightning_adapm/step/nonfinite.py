"""Gradients for steps: in float32 at least, and zero where they are not finite."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adapm.sharding.find import has_values
from lightning_adapm.sharding.reduction import all_reduce
from lightning_adapm.step.parts import Task

_WATCHED = 3
"""Number of consecutive steps with only broken gradients before a warning."""

_COPIED_TOGETHER = 8
"""Number of steps whose flaws are copied from a device together."""

_ALL_BROKEN = (
    "every gradient held an infinity or a NaN in {steps} steps in a row: they counted as zero, and nothing was trained."
    " Lower the learning rate or clip gradients; train in bfloat16 or float32 instead of float16, or with a gradient"
    " scaler. The optimizer's nonfinite_gradients() counts such steps by parameter"
)

Key = tuple[Tensor, str]
"""Identity of a piece: its parameter and its prefix."""


class NonFiniteGradients:
    """Counts per piece of the steps whose gradient held an infinity or a NaN; such a gradient counts as zero.

    The counts are on the gradient's device, so that no step waits for them.
    """

    def __init__(self) -> None:
        self._names: dict[Key, str] = {}
        self._counts: dict[Key, tuple[Tensor, int]] = {}
        """Counts of all pieces of a batch, and the place of this one among them."""
        self._agreed: dict[Key, Tensor] = {}
        self._watch = Watch()

    def steps(self) -> dict[str, int]:
        """Number of steps by name, for names with any; waits for the device."""
        whole = {id(counts): counts for counts, _ in self._counts.values()}
        numbers = {key: counts.tolist() for key, counts in whole.items()}
        steps: Counter[str] = Counter()
        for key, (counts, place) in self._counts.items():
            steps[self._names[key]] += numbers[id(counts)][place]
        return {name: number for name, number in steps.items() if number}

    def agree(self, tasks: Iterable[Task], params: Iterable[Tensor]) -> None:
        """Let the processes that hold parts of a piece agree on whether its gradient is finite, in one collective.

        Args:
            tasks: Of this step, in any order: how they are put together depends on what each process has seen.
            params: All parameters, in the order that is the same on every process.
        """
        self._agreed = {}
        shared = [task for task in tasks if task.layout is not None and len(task.layout.spans) > 1]
        if not shared:
            return
        order = {param: place for place, param in enumerate(params)}
        by_group: dict[Any, list[Task]] = defaultdict(list)
        for task in sorted(shared, key=lambda task: (order[task.owner], task.piece.start)):
            assert task.layout is not None
            by_group[task.layout.group].append(task)
        for group, together in by_group.items():
            flags = torch.stack([_finite([task.taken().grad])[0] for task in together]).to(torch.int32)
            all_reduce(flags, group, dist.ReduceOp.MIN)
            self._agreed.update(zip([task.key for task in together], (flags != 0).unbind(), strict=True))

    def let_go(self, held: set[Tensor]) -> None:
        """Forget all parameters but those ``held``."""
        self._agreed = {}
        for known in (self._counts, self._names):
            for key in [key for key in known if key[0] not in held]:
                del known[key]

    def finish_step(self) -> None:
        """Finish a step, after :meth:`count` for every batch."""
        if self._watch.finish_step():
            warnings.warn(_ALL_BROKEN.format(steps=_WATCHED), stacklevel=5)  # of whoever calls step()

    def replace(self, tasks: list[Task], maximize: bool) -> list[Task]:
        """Replace gradients by those to descend along, with broken ones zeroed and counted."""
        exact = [task.grad if task.grad.dtype == torch.float64 else task.grad.float() for task in tasks]
        if maximize:
            exact = list(torch._foreach_neg(exact))
        if not has_values(exact[0]):
            return [task._replace(grad=grad) for task, grad in zip(tasks, exact, strict=True)]
        on_device = exact[0].device.type != "cpu"
        if on_device and exact[0].dim() and all(grad.shape == exact[0].shape for grad in exact):
            exact = self._zeroed(tasks, torch.stack(exact))
        else:
            finite = self.agreed_on(tasks)
            finite = _finite(exact) if finite is None else finite
            flaws = (~finite).to(torch.int32)
            if on_device or flaws.any():  # on a CPU, asking costs nothing
                self.count(tasks, flaws)
                exact = [torch.where(fine, grad, 0.0) for fine, grad in zip(finite.unbind(), exact, strict=True)]
            else:
                self._watch.see(flaws)
        return [task._replace(grad=grad) for task, grad in zip(tasks, exact, strict=True)]

    def _zeroed(self, tasks: list[Task], grads: Tensor) -> list[Tensor]:
        """Zero broken gradients ``(tasks, ...)``, by a few kernels for all of them."""
        finite = self.agreed_on(tasks)
        if finite is None:
            finite = grads.sum(dim=-1).view(len(tasks), -1).isfinite().all(dim=-1)
        self.count(tasks, (~finite).to(torch.int32))
        return list(grads.masked_fill_(~finite.view(-1, *(1,) * (grads.dim() - 1)), 0.0).unbind())

    def agreed_on(self, tasks: list[Task]) -> Tensor | None:
        """Flags ``(tasks,)`` of finite gradients, agreed between processes."""
        if not self._agreed or tasks[0].key not in self._agreed:
            return None
        return torch.stack([self._agreed[task.key] for task in tasks])

    def count(self, tasks: list[Task], flaws: Tensor) -> None:
        """Count a step for tasks whose entry in ``flaws`` ``(tasks,)`` is 1, not 0."""
        counts = self._together([task.key for task in tasks])
        if counts is None:
            counts = self._gathered(tasks, flaws)
        counts += flaws
        self._watch.see(flaws)

    def _together(self, keys: list[Key]) -> Tensor | None:
        """Counts of pieces that were counted together in this order last time; None for others."""
        found = [self._counts.get(key) for key in keys]
        if found[0] is None or len(found[0][0]) != len(keys):
            return None
        counts = found[0][0]
        same = all(each is not None and each[0] is counts and each[1] == place for place, each in enumerate(found))
        return counts if same else None

    def _gathered(self, tasks: list[Task], like: Tensor) -> Tensor:
        """Gather the counts of pieces into one tensor for the next time."""
        found = [self._counts.get(task.key) for task in tasks]
        counts = torch.stack([like.new_zeros(()) if each is None else each[0][each[1]].to(like) for each in found])
        for place, task in enumerate(tasks):
            self._counts[task.key] = counts, place
            self._names[task.key] = _name(task)
        return counts


class Watch:
    """Notices steps in a row whose gradients are all broken, without waiting for a device.

    Flaws on a device are copied to the host for several steps at once, and looked at when they have arrived.
    """

    def __init__(self) -> None:
        self._flaws: list[Tensor] = []
        """Flaws of the batches since the last copy, in order."""
        self._sizes: list[int] = [0]
        """Number of flaws in each step since then."""
        self._copied: tuple[Tensor, list[int], torch.cuda.Event | None] | None = None
        self._in_a_row = 0
        self._over = False

    def __getstate__(self) -> dict[str, Any]:
        return {"_in_a_row": self._in_a_row, "_over": self._over}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {"_flaws": [], "_sizes": [0], "_copied": None, **state}

    def see(self, flaws: Tensor) -> None:
        """Add the flaws of a batch."""
        if not self._over:
            self._flaws.append(flaws)
            self._sizes[-1] += len(flaws)

    def finish_step(self) -> bool:
        """Whether to warn now; true once."""
        if self._over or not self._flaws:
            return False
        device = self._flaws[0].device
        if self._copied is None and (device.type != "cuda" or len(self._sizes) == _COPIED_TOGETHER):
            flaws = torch.cat([each.to(device) for each in self._flaws]).to("cpu", non_blocking=True)
            event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            self._copied, self._flaws, self._sizes = (flaws, self._sizes, event), [], []
        self._sizes.append(0)
        if self._copied is not None and (self._copied[2] is None or self._copied[2].query()):
            flaws, sizes, _ = self._copied
            self._copied = None
            for step in flaws.split(sizes):
                self._in_a_row = self._in_a_row + 1 if len(step) and step.all() else 0
                self._over = self._over or self._in_a_row == _WATCHED
        return self._over


def _name(task: Task) -> str:
    return task.name if task.piece.whole else f"{task.name} ({task.piece.prefix.removesuffix('.')})"


def _finite(grads: list[Tensor]) -> Tensor:
    """Whether each gradient is finite, for gradients of one shape.

    An infinity or a NaN reaches the sum of its row. Sums over whole gradients would overflow for large finite ones.
    """
    exact = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    return torch.stack([grad.sum(dim=-1, dtype=exact).flatten() for grad in grads]).isfinite().all(dim=-1)
