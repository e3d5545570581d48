"""Interleaving of tasks, so that a device works on one while the collectives of others are in flight."""

from collections.abc import Iterable, Iterator, Sequence

from lightning_adapm.sharding.collectives import Pending, Planned, begin_and_wait

Task = Iterator[Sequence[Planned]]
"""Yields the collectives that must be done before it can continue."""


def interleave(tasks: Iterable[Task]) -> None:
    """Complete all tasks, each of which waits for collectives now and then.

    A new task begins before the earlier ones continue, so that the device works on it while their collectives are in
    flight. Only a few tasks are in progress at a time, and they continue in the same order on every process.
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
