"""Work on several batches at once, where a device would wait for other processes between one part and the next."""

from collections.abc import Iterable, Iterator, Sequence

from lightning_adapm.sharding.collectives import Flight, Planned, fly

Work = Iterator[Sequence[Planned]]
"""Yields collectives that are to be done before it goes on."""


def take_turns(works: Iterable[Work]) -> None:
    """Do all of some works, which wait for collectives in between.

    Each begins before those before it go on, which have waited for longer. So the device does it while these wait, and
    no more than a few are in progress. On every process, all take the same turns.
    """
    turns = _Turns()
    for work in works:
        turns.take(work)
    while turns.waiting:
        turns.take()


class _Turns:
    def __init__(self) -> None:
        self.waiting: list[tuple[Work, Flight]] = []
        """The newest first."""
        self._next: Flight | None = None
        """What has not begun yet. It begins together with a wait, so that there are fewer breaks between launches."""

    def take(self, *new: Work) -> None:
        """Begin new work, if any, and let all that wait go on to where they wait again."""
        older, self.waiting = self.waiting, []
        for work in new:
            self._go_on(work, None)
        for work, flight in older:
            self._go_on(work, flight)

    def _go_on(self, work: Work, awaited: Flight | None) -> None:
        if self._next is not None or awaited is not None:
            fly(self._next, awaited)
            self._next = None
        planned = next(work, None)
        if planned is not None:
            self._next = Flight(planned)
            self.waiting.append((work, self._next))
