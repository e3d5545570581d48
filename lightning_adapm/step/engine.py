"""The order of a step: parts are sorted into buckets, and each bucket moves batch by batch, on one path."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.batches import Stacked
from lightning_adapm.moments.cache import DeviceCache, using
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.collectives import Planned
from lightning_adapm.step import by_kernels, by_loops, exchange, graphs, loops, refreshing
from lightning_adapm.step.batching import Batch, batches, bucketed, put_back
from lightning_adapm.step.counters import count_step
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.gradients import Gradients
from lightning_adapm.step.graphs import Pool
from lightning_adapm.step.interleaving import Task, interleave
from lightning_adapm.step.nonfinite import NonFiniteGradients
from lightning_adapm.step.parts import Alike, Part
from lightning_adapm.step.paths import Path, StepPath
from lightning_adapm.step.recorder import REPLAYED, UNLIKE, Recorder
from lightning_adapm.step.recording import Clocks, Found
from lightning_adapm.step.watching import Observer
from lightning_adapm.step.work import Work

_UNRECORDED = "launched: steps are recorded on a GPU, where their caller does not record them and no monitor sees them"


class Rule(Protocol):
    """Interface of an optimizer for the engine: its state, groups, and decisions about parts and their steps."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    observer: Observer | None
    most_recorded_bytes: int

    @property
    def state(self) -> Mapping[Tensor, Any]: ...

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum: ...

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment: ...

    def path_for(self, parts: Sequence[Part], grads: Sequence[Tensor], group: Mapping[str, Any]) -> Path: ...

    def move(self, batch: Batch, group: Mapping[str, Any]) -> None: ...


class Engine:
    """Moves parameters along their gradients, and keeps what is needed between steps."""

    def __init__(self) -> None:
        self.nonfinite = NonFiniteGradients()
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"nonfinite": self.nonfinite}  # caches are left out: they belong to a process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.forget()

    def forget(self) -> None:
        """Drop everything that is kept for speed alone."""
        self._counters: dict[Tensor, Stacked | None] = {}
        """Counters, by the first of the parameters that are counted together."""
        self._cache = DeviceCache()
        self._pool = Pool()
        self._recorders: defaultdict[Tensor, Recorder] = defaultdict(partial(Recorder, self._pool))
        """Recorders, by the first of the parameters that move together: all, or those of one turn inside backward."""
        self._latest: list[Recorder] = []
        """Recorders that the latest step used."""

    @property
    def cached_bytes(self) -> int:
        """Bytes that are kept for speed alone."""
        return self._cache.nbytes + self._pool.nbytes + sum(each.nbytes for each in self._recorders.values())

    def _launches(self, device: torch.device, rule: Rule) -> str:
        """:data:`~lightning_adapm.step.recorder.REPLAYED` where steps like the latest are, or why they are not."""
        if not records(rule, device):
            return _UNRECORDED
        found = [each.launches for each in self._latest] or [UNLIKE]
        return next((each for each in found if each != REPLAYED), REPLAYED)

    def move(self, works: Sequence[Work], rule: Rule) -> Sequence[Found]:
        """Move parameters along their gradients, and count one more step for each.

        Args:
            works: The parameters, with the options of their group; none of them is empty.
            rule: The optimizer.

        Returns:
            Flaws and sums of squares that kernels found in the gradients of the parts that they moved.
        """
        device, works = works[0].device, [work._replace(counts=self._count(work)) for work in works]
        with _without_autocast(device.type), using(self._cache):
            recorder = self._recorder(works[0].first) if records(rule, device) else None
            found: Sequence[Found] | None = None if recorder is None else recorder.replayed(works)
            if found is None:
                found = self._launched(works, rule, recorder)
            for each in found:
                self.nonfinite.count(each.parts, each.flaws)
        return found

    def _recorder(self, first: Tensor) -> Recorder:
        """The recorder of the parameters that move together with the ``first`` of them."""
        recorder = self._recorders[first]
        if recorder in self._latest:  # a new step, because parameters move once in each
            self._latest.clear()
        self._latest.append(recorder)
        return recorder

    def _count(self, work: Work) -> list[int]:
        """Count one more step of parameters."""
        known = self._counters.get(work.first)
        counts, found = count_step(work.states, known)
        if found is None or found is not known:
            work.settle()
            self._counters[work.first] = found
        return counts

    def _launched(self, works: Sequence[Work], rule: Rule, recorder: Recorder | None) -> Sequence[Found]:
        """Take a step by launching its kernels one by one; return what they found out about gradients."""
        planned: list[tuple[Mapping[str, Any], list[Batch]]] = []
        bound = [part for work in works for part in work.bound()]
        try:
            for work in works:
                moving = zip(work.grads, work.parts, work.counts, strict=True)
                planned.append((work.group, bucketed(moving, partial(rule.path_for, group=work.group))))
            every = [bucket for _, buckets in planned for bucket in buckets]
            # left out: whole rows of sharded matrices, whose kernels check gradients as they read them
            apart = (bucket for bucket in every if bucket.parts[0].shard is None or not bucket.path.whole)
            self.nonfinite.agree(pair for bucket in apart for pair in zip(bucket.parts, bucket.grads, strict=True))

            def launch(clocks: Clocks | None) -> list[Found]:
                return [found for group, buckets in planned for found in self._moved(buckets, group, rule, clocks)]

            if recorder is None:
                return launch(None)
            paths = [bucket.path for bucket in every]
            return recorder.run(works, paths, launch, self._cache, rule.most_recorded_bytes)
        finally:
            for part in bound:
                part.release()

    def _moved(
        self, buckets: Iterable[Batch], group: Mapping[str, Any], rule: Rule, clocks: Clocks | None
    ) -> list[Found]:
        together: list[Batch] = []
        found: list[Found] = []
        for batch in chain.from_iterable(map(batches, buckets)):
            if not batch.path.kernels:
                self._move_by_torch(batch, group, rule)
                continue
            grads = DeviceGradients.of(batch, self.nonfinite.agreed_on(batch.parts))
            if clocks is not None:
                grads.clock = clocks(batch, group["lr"])
            batch = batch._replace(grads=grads)
            if batch.path.whole:
                together.append(batch)
            else:
                interleave([_moving(batch, group, rule)])
                found += _found([batch])
        interleave(_moving_in_rounds(together, group, rule))
        return found + _found(together)

    def _move_by_torch(self, batch: Batch, group: Mapping[str, Any], rule: Rule) -> None:
        with loops.threads_for_loops() if batch.path.loops else nullcontext():
            # batch by batch, because float32 copies of all gradients would be larger than the state that is saved
            wrapped = by_loops.wrapped(batch) if batch.path.loops else Gradients
            finite = self.nonfinite.replaced(batch.parts, batch.grads, bool(group["maximize"]), wrapped)
            rule.move(batch._replace(grads=finite), group)
            put_back(batch)

    def paths(self, work: Work, rule: Rule) -> list[StepPath]:
        """List the paths that parameters will take if their gradients have the parameters' memory layout."""
        alike: defaultdict[Alike, list[Part]] = defaultdict(list)
        for part in work.bound():
            alike[part.alike].append(part)
        rows: list[StepPath] = []
        for parts in alike.values():
            path = rule.path_for(parts, [part.view for part in parts], work.group)
            roles = tuple(dict.fromkeys(part.piece.role for part in parts))
            rows.append(StepPath(tuple(parts[0].shape), len(parts), roles, *path, self._launches(work.device, rule)))
            for part in parts:
                part.release()
        return rows


def _moving_in_rounds(together: Sequence[Batch], group: Mapping[str, Any], rule: Rule) -> Iterator[Task]:
    """Yield tasks that move batches while others wait for collectives. A round is read before its first batch moves."""
    for some in exchange.rounds(together):
        exchange.begin(some)
        refreshing.refresh(some)
        for batch in some:
            yield _moving(batch, group, rule)


def _moving(batch: Batch, group: Mapping[str, Any], rule: Rule) -> Iterator[Sequence[Planned]]:
    step = by_kernels.step if batch.path.whole else by_kernels.step_with_reductions
    yield from step(batch, group, rule.observer)
    put_back(batch)


def _found(moved: Sequence[Batch]) -> list[Found]:
    """Collect the flaws and sums of squares that kernels found in the gradients of batches."""
    readings = [(batch, batch.grads.reading) for batch in moved if isinstance(batch.grads, DeviceGradients)]
    return [Found(batch.parts, reading.flaws, [reading.squares]) for batch, reading in readings]


def records(rule: Rule, device: torch.device) -> bool:
    """Whether an optimizer's steps on a device may be recorded."""
    return bool(rule.most_recorded_bytes) and rule.observer is None and graphs.can_capture(device)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Disable a caller's autocast during a step, because it would compute products in half precision."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()  # the usual case; the meta device has no autocast
