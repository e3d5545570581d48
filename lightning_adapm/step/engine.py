"""A step of parameters along their gradients: sorted into buckets of parts, and moved batch by batch on one path."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_adapm.moments.cache import DeviceCache
from lightning_adapm.step import by_kernels
from lightning_adapm.step.batching import Batch, Bucket, batches, bucketed, put_back
from lightning_adapm.step.counters import StepCounters
from lightning_adapm.step.nonfinite import NonFiniteGradients
from lightning_adapm.step.parts import Alike, Part
from lightning_adapm.step.paths import Path, StepPath
from lightning_adapm.step.watching import Observer


class Rule(Protocol):
    """What an optimizer decides of a step."""

    observer: Observer | None

    def path_for(self, parts: Sequence[Part], grads: Sequence[Tensor], group: Mapping[str, Any]) -> Path: ...

    def move(self, batch: Batch, group: Mapping[str, Any]) -> None: ...


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


class Engine:
    """Moves parameters along their gradients, and keeps what that needs from step to step."""

    def __init__(self) -> None:
        self.nonfinite = NonFiniteGradients()
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"nonfinite": self.nonfinite}  # caches are a process's own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.forget()

    def forget(self) -> None:
        """Drop everything that is kept for speed alone."""
        self._counters: defaultdict[Tensor, StepCounters] = defaultdict(StepCounters)
        """By the first of the parameters that are counted together."""
        self._cache = DeviceCache()

    @property
    def cached_bytes(self) -> int:
        """Bytes that are kept for speed alone."""
        return self._cache.nbytes

    def move(self, work: Sequence[tuple[Mapping[str, Any], Sequence[Moving]]], rule: Rule) -> None:
        """Count one more step of parameters, and move them.

        Args:
            work: Options, as a parameter group has them, each with the parameters that move by them: at least one.
            rule: The optimizer's decisions.
        """
        gathered: list[tuple[Mapping[str, Any], list[Bucket]]] = []
        with _without_autocast(work[0][1][0].held.device.type), self._cache.in_use():
            try:
                gathered += ((group, self._gather(moving)) for group, moving in work)
                self.nonfinite.agree(
                    pair
                    for _, buckets in gathered
                    for bucket in buckets
                    for pair in zip(bucket.parts, bucket.grads, strict=True)
                )
                for group, buckets in gathered:
                    self._move_together(buckets, group, rule)
            finally:
                for part in chain.from_iterable(bucket.parts for _, buckets in gathered for bucket in buckets):
                    part.release()

    def _gather(self, moving: Sequence[Moving]) -> list[Bucket]:
        """Count one more step of parameters, and sort their parts into buckets that step together."""
        moving = [each.bind() for each in moving if each.is_something]
        if not moving:
            return []
        counters, states = self._counters[moving[0].parts[0].param], [each.state for each in moving]
        if not counters.have_counted(states):
            for each in moving:
                each.settle()
        steps = counters.count(states)
        return list(bucketed((each.grad, each.parts, step) for each, step in zip(moving, steps, strict=True)))

    def _move_together(self, buckets: Iterable[Bucket], group: Mapping[str, Any], rule: Rule) -> None:
        ready: list[Batch] = []
        for bucket in buckets:
            path = rule.path_for(bucket.parts, bucket.grads, group)
            for batch in batches(bucket, path):
                if path.kernels:
                    grads = by_kernels.DeviceGradients(batch.grads, self.nonfinite.agreed_on(batch.parts))
                    batch = batch._replace(grads=grads)
                if bucket.parts[0].shard is None:
                    ready.append(batch)
                else:  # one after another: rows that are taken out of parameters may be copies
                    self._update(batch, group, rule)
                    put_back(batch)
        by_kernels.refresh(ready)
        for batch in ready:
            self._update(batch, group, rule)

    def _update(self, batch: Batch, group: Mapping[str, Any], rule: Rule) -> None:
        grads = batch.grads
        if isinstance(grads, by_kernels.DeviceGradients):
            step = by_kernels.step if batch.path.whole else by_kernels.step_with_reductions
            step(batch, group, rule.observer)
            self.nonfinite.count(batch.parts, grads.reading.flaws)
        else:
            # only now, batch by batch: copies of all gradients in float32 would be larger than the state that is saved
            finite = self.nonfinite.replaced(batch.parts, grads, bool(group["maximize"]))
            rule.move(batch._replace(grads=finite), group)

    @staticmethod
    def paths(params: Iterable[Moving], group: Mapping[str, Any], rule: Rule) -> list[StepPath]:
        """List the paths that parameters will take, of gradients that lie in memory as the parameters do."""
        alike: defaultdict[Alike, list[Part]] = defaultdict(list)
        for part in chain.from_iterable(each.bind().parts for each in params if each.is_something):
            alike[part.alike].append(part)
        rows: list[StepPath] = []
        for parts in alike.values():
            path = rule.path_for(parts, [part.view for part in parts], group)
            roles = tuple(dict.fromkeys(part.piece.role for part in parts))
            rows.append(StepPath(tuple(parts[0].shape), len(parts), roles, *path))
            for part in parts:
                part.release()
        return rows


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Keep a caller's autocast, which would take products to half precision, out of a step."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # the meta device has none
