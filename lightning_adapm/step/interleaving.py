"""Interleaved tasks, so that a device works on one while the collectives of others are in flight."""

from collections.abc import Iterable, Iterator, Sequence

from lightning_adapm.sharding.collectives import Pending, Planned, begin_and_wait

Task = Iterator[Sequence[Planned]]
"""Yields the collectives that have to be done before it goes on."""


def interleave(tasks: Iterable[Task]) -> None:
    """Do all of some tasks, each of which waits for collectives in between.

    Each begins before those before it go on, which have waited for longer. So the device does it while these wait, and
    no more than a few are in progress. On every process, tasks go on in the same order.
    """
    coming = iter(tasks)
    waiting: list[tuple[Task, Pending]] = []  # the newest first
    begins: Pending | None = None  # together with a wait, so that there are fewer breaks between launches
    while (new := next(coming, None)) is not None or waiting:
        ready: list[tuple[Task, Pending | None]] = [] if new is None else [(new, None)]
        ready += waiting
        waiting = []
        for task, awaited in ready:
            if begins is not None or awaited is not None:
                begin_and_wait(begins, awaited)
                begins = None
            planned = next(task, None)
            if planned is not None:
                begins = Pending(planned)
                waiting.append((task, begins))
