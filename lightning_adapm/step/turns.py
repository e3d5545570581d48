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
    coming = iter(works)
    waiting: list[tuple[Work, Flight]] = []  # the newest first
    begins: Flight | None = None  # together with a wait, so that there are fewer breaks between launches
    while (new := next(coming, None)) is not None or waiting:
        turn: list[tuple[Work, Flight | None]] = [] if new is None else [(new, None)]
        turn += waiting
        waiting = []
        for work, awaited in turn:
            if begins is not None or awaited is not None:
                fly(begins, awaited)
                begins = None
            planned = next(work, None)
            if planned is not None:
                begins = Flight(planned)
                waiting.append((work, begins))
