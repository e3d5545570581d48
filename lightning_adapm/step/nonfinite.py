"""Gradients for steps: in float32 at least, and zero where they are not finite."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_adapm.moments.batches import Stacked
from lightning_adapm.roles.callers import warn_caller
from lightning_adapm.sharding.collectives import all_reduce
from lightning_adapm.sharding.find import has_values
from lightning_adapm.step.gradients import Gradients
from lightning_adapm.step.parts import Part

_WATCHED = 3
"""Number of consecutive steps without a finite gradient before a warning."""

_FINE = torch.zeros(1, dtype=torch.int32, device="cpu")
"""Flaws of gradients that have none; a single one serves for any number of gradients."""

_COPIED_TOGETHER = 8
"""Number of steps whose flaws are copied from a device together."""

_ALL_BROKEN = (
    "every gradient held an infinity or a NaN in {steps} steps in a row: they counted as zero, and nothing was trained."
    " Lower the learning rate or clip gradients; train in bfloat16 or float32 instead of float16, or with a gradient"
    " scaler. The optimizer's nonfinite_gradients() counts such steps by parameter"
)

Key = tuple[int, int]
"""Identity of a part; see :attr:`lightning_adapm.step.parts.Part.key`."""


class NonFiniteGradients:
    """Counts, per piece, the steps whose gradient held an infinity or a NaN; such a gradient counts as zero.

    The counts are on the gradient's device, so that no step waits for them. Nor does one wait for the warning after
    some steps in a row whose gradients are all broken: flaws on a device are copied to the host for several steps at
    once, and looked at when they have arrived.
    """

    def __init__(self) -> None:
        self._names: dict[Key, str] = {}
        self._counts: dict[Key, tuple[Tensor, int]] = {}
        """Counts of all pieces of a batch, and the place of this one among them."""
        self._agreed: dict[Key, Tensor] = {}
        self._in_a_row = 0
        """Number of latest steps without a finite gradient, as far as their flaws have arrived."""
        self._warned = False
        self._forget_steps()

    def _forget_steps(self) -> None:
        self._latest: tuple[Sequence[Part], Tensor] | None = None
        """The parts that were counted last, with their counts: those of a recorded step are always the same list."""
        self._flaws: list[Tensor] = []
        """Flaws of the batches since the last copy, in order."""
        self._sizes: list[int] = [0]
        """Number of flaws in each step since then."""
        self._copied: tuple[Tensor, list[int], torch.cuda.Event | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_latest", "_flaws", "_sizes", "_copied")
        return {key: value for key, value in vars(self).items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._forget_steps()

    def steps(self) -> dict[str, int]:
        """Number of such steps by name, where there were any; waits for the device."""
        whole = {id(counts): counts for counts, _ in self._counts.values()}
        numbers = {key: counts.tolist() for key, counts in whole.items()}
        steps: Counter[str] = Counter()
        for key, (counts, place) in self._counts.items():
            steps[self._names[key]] += numbers[id(counts)][place]
        return {name: number for name, number in steps.items() if number}

    def agree(self, moving: Iterable[tuple[Part, Tensor]]) -> None:
        """Let the processes that hold parts of a piece agree on whether its gradient is finite, in one collective.

        Args:
            moving: Parts of this step with their gradients, in any order: how they are put together depends on what
                each process has seen. The processes hold the same parts, if only nothing of some.
        """
        self._agreed = {}
        by_group: dict[Any, list[tuple[Part, Tensor]]] = defaultdict(list)
        shared = [(part, grad) for part, grad in moving if part.is_shared]
        for part, grad in sorted(shared, key=lambda pair: pair[0].key):
            assert part.layout is not None
            by_group[part.layout.group].append((part, grad))
        for group, together in by_group.items():
            grads = [grad if part.shard is None else part.matrix(grad) for part, grad in together]
            flags = _each_finite(grads).to(torch.int32)
            all_reduce(flags, group, dist.ReduceOp.MIN)
            self._agreed.update(zip([part.key for part, _ in together], (flags != 0).unbind(), strict=True))

    def keep_only(self, held: set[int]) -> None:
        """Forget all parameters except those with the numbers ``held``."""
        self._agreed, self._latest = {}, None
        for known in (self._counts, self._names):
            for key in [key for key in known if key[0] not in held]:
                del known[key]

    def finish_step(self) -> None:
        """Finish a step, after :meth:`count` for every batch. Warn once if several steps had no finite gradient."""
        if self._warned or not self._flaws:
            return
        device = self._flaws[0].device
        if self._copied is None and (device.type != "cuda" or len(self._sizes) == _COPIED_TOGETHER):
            flaws = torch.cat([each.to(device) for each in self._flaws]).to("cpu", non_blocking=True)
            event = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            self._copied, self._flaws, self._sizes = (flaws, self._sizes, event), [], []
        self._sizes.append(0)
        if self._copied is not None and (self._copied[2] is None or self._copied[2].query()):
            flaws, sizes, _ = self._copied
            self._copied = None
            self._watch(flaws.split(sizes))

    def _watch(self, steps: Iterable[Tensor]) -> None:
        """Warn once if, with the flaws of ``steps``, several steps in a row had no finite gradient."""
        for flaws in steps:
            self._in_a_row = self._in_a_row + 1 if len(flaws) and flaws.all() else 0
            self._warned = self._warned or self._in_a_row == _WATCHED
        if self._warned:
            self._flaws.clear()
            warn_caller(_ALL_BROKEN.format(steps=_WATCHED))

    def _see(self, flaws: Tensor) -> None:
        if not self._warned:
            self._flaws.append(flaws)
            self._sizes[-1] += len(flaws)

    def replaced(
        self,
        parts: Sequence[Part],
        grads: list[Tensor],
        maximize: bool,
        wrapped: Callable[[Iterable[Tensor]], Gradients] = Gradients,
    ) -> list[Tensor]:
        """The gradients to use for parts of one shape, dtype and device; on a CPU, ``wrapped``."""
        exact = [grad if grad.dtype == torch.float64 else grad.float() for grad in grads]
        if maximize:
            exact = list(torch._foreach_neg(exact))
        if not has_values(exact[0]):
            return exact
        on_device = exact[0].device.type != "cpu"
        if on_device and exact[0].dim() and len(exact) > 1 and all(grad.shape == exact[0].shape for grad in exact):
            return self._zeroed(parts, torch.stack(exact))
        if on_device:
            finite = self.agreed_on(parts)
            finite = _finite(exact) if finite is None else finite
            self.count(parts, (~finite).to(torch.int32))
            return [torch.where(fine, grad, 0.0) for fine, grad in zip(finite.unbind(), exact, strict=True)]
        return self._on_cpu(parts, exact, wrapped)

    def _on_cpu(
        self, parts: Sequence[Part], grads: list[Tensor], wrapped: Callable[[Iterable[Tensor]], Gradients]
    ) -> list[Tensor]:
        """Gradients on a CPU, where checking costs no synchronization; those that are not finite become zero."""
        alone = list if parts[0].is_shared else wrapped  # shards may differ in shape
        found, finite = alone(grads), self.agreed_on(parts)
        if finite is None and isinstance(found, Gradients) and found.finite:
            self._see(_FINE)
            return found
        finite = _finite(grads) if finite is None else finite
        if finite.all():
            self._see(_FINE)
            return found
        self.count(parts, (~finite).to(torch.int32))
        return alone(g if fine else torch.zeros_like(g) for g, fine in zip(grads, finite.tolist(), strict=True))

    def _zeroed(self, parts: Sequence[Part], grads: Tensor) -> list[Tensor]:
        """Gradients as one tensor, by a few kernels for all of them."""
        finite = self.agreed_on(parts)
        if finite is None:
            finite = grads.sum(dim=-1).view(len(parts), -1).isfinite().all(dim=-1)
        self.count(parts, (~finite).to(torch.int32))
        return Stacked(grads.masked_fill_(~finite.view(-1, *(1,) * (grads.dim() - 1)), 0.0))

    def agreed_on(self, parts: Sequence[Part]) -> Tensor | None:
        """Flags ``(parts,)`` of finite gradients, as far as the processes have agreed on them."""
        if not self._agreed or parts[0].key not in self._agreed:
            return None
        return torch.stack([self._agreed[part.key] for part in parts])

    def count(self, parts: Sequence[Part], flaws: Tensor) -> None:
        """Count a step for the parts whose entry in ``flaws`` ``(parts,)`` is 1, not 0."""
        if self._latest is None or self._latest[0] is not parts:
            counts = self._together([part.key for part in parts])
            self._latest = parts, self._gathered(parts, flaws) if counts is None else counts
        self._latest[1].add_(flaws)
        self._see(flaws)

    def _together(self, keys: list[Key]) -> Tensor | None:
        """Counts of pieces, if they were counted together in this order last time; else None."""
        found = [self._counts.get(key) for key in keys]
        if found[0] is None or len(found[0][0]) != len(keys):
            return None
        counts = found[0][0]
        same = all(each is not None and each[0] is counts and each[1] == place for place, each in enumerate(found))
        return counts if same else None

    def _gathered(self, parts: Sequence[Part], like: Tensor) -> Tensor:
        """Counts of pieces that were not counted together, joined into one tensor from now on."""
        found = [self._counts.get(part.key) for part in parts]
        counts = torch.stack([like.new_zeros(()) if each is None else each[0][each[1]].to(like) for each in found])
        for place, part in enumerate(parts):
            self._counts[part.key] = counts, place
            self._names[part.key] = part.label
        return counts


def _each_finite(grads: Sequence[Tensor]) -> Tensor:
    """Whether each gradient is finite, for gradients of any shapes, by a few kernels for all of them."""
    largest = torch._foreach_norm([grad if grad.numel() else grad.new_zeros(1) for grad in grads], torch.inf)
    exact = reduce(torch.promote_types, (value.dtype for value in largest))
    return torch.stack([value.to(exact) for value in largest]).isfinite()


def _finite(grads: list[Tensor]) -> Tensor:
    """Whether each gradient is finite, for gradients of one shape.

    An infinity or a NaN reaches the sum of its row. Sums over whole gradients would overflow for large finite ones.
    """
    exact = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    return torch.stack([grad.sum(dim=-1, dtype=exact).flatten() for grad in grads]).isfinite().all(dim=-1)
