"""Recording and replaying of steps: the host launches some hundred kernels in a step, which takes it longer than a GPU
takes for a model of a hundred million parameters.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import Tensor

from lightning_adapm.moments.base import Momentum
from lightning_adapm.moments.cache import DeviceCache
from lightning_adapm.step import graphs
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.clock import Clock, is_clocked
from lightning_adapm.step.fingerprint import Fingerprint, addresses
from lightning_adapm.step.graphs import Pool
from lightning_adapm.step.parts import Part
from lightning_adapm.step.paths import Path
from lightning_adapm.step.recording import Clocks, Found, Recording
from lightning_adapm.step.transients import held_by_recorded_steps
from lightning_adapm.step.work import Work

MOST_BYTES = 1 << 29
"""Default bound on the temporaries of steps that are recorded, which graphs keep from step to step."""
_SHARE = 20
"""Where processes share rows, steps whose temporaries are this part of a GPU's memory are recorded, too: the host takes
longer than a GPU for models of any size there.
"""

REPLAYED = "replayed"
UNLIKE = "launched: no two steps have been alike yet"

_MISSES = 3
"""Number of steps in a row unlike those recorded, after which these are forgotten."""
_WORTH = 16
"""Number of replays that are worth their captures. Where steps changed before, the next must come twice as often before
they are captured.
"""
_PARTS, _HELD, _GRADS, _STATES, _COUNTS = map(attrgetter, ("parts", "held", "grads", "states", "counts"))
_DTYPE = attrgetter("dtype")
_VARYING = frozenset({"params", "param_names", "roles", "lr"})
Launch = Callable[[Clocks | None], Sequence[Found]]
"""Launches a step by kernels that are given numbers, or clocks."""


class Signature:
    """The common part of a recording's steps: the parameters, where all but gradients lie, options.

    It keeps no state alive.
    """

    def __init__(self, works: Sequence[Work], places: Sequence[int]) -> None:
        self._unmoved = works[0].unmoved
        self._objects, self._grads = Fingerprint(_objects(works)), _properties(works)
        self._numbers = _relative(works), _alignments(places)
        self._options = [_options(work.group) for work in works]
        counts = _all(works, _COUNTS)
        # one of those that are due at the same steps
        self._dues: dict[Hashable, tuple[Momentum, int]] = {}
        for parts, count in zip(_all(works, _PARTS), counts, strict=True):
            for part in parts:
                later = count - counts[0]
                self._dues.setdefault((type(part.first), *vars(part.first).items(), later), (part.first, later))

    def matches(self, works: Sequence[Work], places: Sequence[int]) -> bool:
        """Whether a step is one of them, whose gradients are at these ``places``."""
        return (
            len(works) == len(self._options)
            and self._has(works)
            and (_relative(works), _alignments(places)) == self._numbers
            and all(_have(work.group, options) for work, options in zip(works, self._options, strict=True))
        )

    def _has(self, works: Sequence[Work]) -> bool:
        """Whether these objects, and gradients of these kinds, move."""
        unmoved = works[0].unmoved
        if unmoved is None or unmoved is not self._unmoved:
            if not self._objects.matches(_objects(works)) or _properties(works) != self._grads:
                return False
            self._unmoved = unmoved
        return True

    def kind(self, works: Sequence[Work]) -> Hashable:
        """Compute what distinguishes steps of this signature: which parts do what only some steps do."""
        first = works[0].counts[0]
        return tuple(momentum.due(first + later) for momentum, later in self._dues.values())


def _all(works: Sequence[Work], column: Callable[[Work], Sequence[Any]]) -> list[Any]:
    """List what all works have in a column."""
    return list(chain.from_iterable(map(column, works)))


def _parts(works: Sequence[Work]) -> list[Part]:
    return list(chain.from_iterable(_all(works, _PARTS)))


def _places(works: Sequence[Work]) -> list[int]:
    """Addresses of the gradients."""
    return addresses(_all(works, _GRADS))


def _objects(works: Sequence[Work]) -> list[Any]:
    """List the objects that must stay the same."""
    values = chain.from_iterable(map(dict.values, _all(works, _STATES)))
    return [*_all(works, _PARTS), *_all(works, _HELD), *values]


def _properties(works: Sequence[Work]) -> list[Any]:
    """List what must be equal of the gradients."""
    grads = _all(works, _GRADS)
    return [*(len(work.grads) for work in works), *map(_DTYPE, grads), *map(Tensor.stride, grads)]


def _relative(works: Sequence[Work]) -> list[int]:
    """Numbers of the parameters' steps, after the first one's."""
    first = works[0].counts[0]
    return [count - first for count in _all(works, _COUNTS)]


def _alignments(places: Sequence[int]) -> list[int]:
    return [place % 16 for place in places]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in group.items() if key not in _VARYING}
    return {key: type(value)(value) if isinstance(value, (list, dict)) else value for key, value in kept.items()}


def _have(group: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether a group has these options; tensors must be the same ones, because asking for values waits for them."""
    return all(
        (found := group.get(key)) is value or (not isinstance(value, Tensor) and found == value)
        for key, value in options.items()
    )


def _on_one_device(works: Sequence[Work]) -> bool:
    """Whether everything is on one device whose work can be captured now."""
    devices = {held.device for held in _all(works, _HELD)}
    return len(devices) == 1 and all(map(graphs.can_capture, devices))


def rehearsed(batch: Batch, lr: float) -> Tensor:
    """A clock for one step that is launched as those that are recorded."""
    part = batch.parts[0]
    return Clock.of(part, batch.step, lr).on(part.view.device)


class Recorder:
    """Records and replays the steps of an optimizer.

    Every kind of step is taken with clocks first, which compiles the kernels. The next of its kind is captured.

    Args:
        pool: Memory for temporaries of the graphs.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._failed = False
        self._sized: tuple[list[tuple[int, int]], int | None] = [], None
        self._wasted = self._plays = 0
        self._recordings: dict[Hashable, Recording] = {}
        self._begin(None)

    def _begin(self, signature: Signature | None) -> None:
        """Forget what was recorded, for steps of another signature."""
        self.launches = UNLIKE
        """:data:`REPLAYED`, or why steps are not."""
        if self._recordings:
            self._wasted = self._wasted + 1 if self._plays < _WORTH else 0
        self._signature = signature
        self._plays = 0
        self._recordings = {}
        self._rehearsals: Counter[Hashable] = Counter()
        self._misses = 0

    @property
    def nbytes(self) -> int:
        """Bytes that are kept on the device, besides temporaries."""
        return sum(recording.nbytes for recording in self._recordings.values())

    def replayed(self, works: Sequence[Work]) -> list[Found] | None:
        """Replay a step, if one like it was recorded."""
        if self._signature is None:
            return None
        places = _places(works)
        if not self._signature.matches(works, places):
            self._misses += 1
            return None
        self._misses = 0
        recording = self._recordings.get(self._signature.kind(works))
        if recording is None:
            return None
        self._plays += 1
        return recording.play(works, places)

    def run(
        self, works: Sequence[Work], paths: Sequence[Path], launch: Launch, cache: DeviceCache, limit: int
    ) -> Sequence[Found]:
        """Take a step that was not replayed, and record it where others like it are to come.

        Args:
            works: The step.
            paths: Paths of its buckets.
            launch: Launches it.
            cache: What is kept on the device.
            limit: Bound on the temporaries of steps that are recorded.
        """
        if self._refused(works, paths, limit) or 0 < self._misses < _MISSES:
            return launch(None)
        if self._signature is None or self._misses:
            self._begin(Signature(works, _places(works)))
        assert self._signature is not None
        kind = self._signature.kind(works)
        if self._rehearsals[kind] < 1 << self._wasted:
            self._rehearsals[kind] += 1
            return launch(rehearsed)
        try:
            recording = Recording(works, launch, cache, self._pool)
        except RuntimeError as error:
            self._begin(None)
            self.launches, self._failed = f"launched: a capture failed: {error}", True
            return launch(None)
        self.launches = REPLAYED
        self._recordings[kind] = recording
        return recording.play(works, _places(works))

    def _refused(self, works: Sequence[Work], paths: Sequence[Path], limit: int) -> bool:
        """Whether steps like this one are not recorded, and why."""
        if self._failed:
            return True
        parts, device = _parts(works), works[0].device
        reason, size = "", self._most_held(works)
        most = 0 if size is None else self._pool.need(size)  # all that move in turns are recorded, or none
        if not all(path.whole for path in paths):
            reason = "kernels do not take all of a step"
        elif any(part.shard is None and part.is_shared for part in parts):
            reason = "processes share stacks of matrices"
        elif not _on_one_device(works):
            reason = "parameters are on several devices"
        elif size is None:
            reason = "not all moments read clocks"
        elif most > max(limit, graphs.memory(device) // _SHARE if any(part.is_shared for part in parts) else 0):
            reason = f"temporaries of up to {most} bytes would be kept"
        self.launches = f"launched: {reason}" if reason else self.launches
        return bool(reason)

    def _most_held(self, works: Sequence[Work]) -> int | None:
        """Bound on the temporaries of a step, computed once for its parts; None where moments read no clock."""
        counts = [count for work in works for parts, count in zip(work.parts, work.counts, strict=True) for _ in parts]
        parts, first = _parts(works), counts[0]
        key = [(id(part), count - first) for part, count in zip(parts, counts, strict=True)]
        if key != self._sized[0]:
            self._sized = key, held_by_recorded_steps(parts, counts) if all(map(is_clocked, parts)) else None
        return self._sized[1]
