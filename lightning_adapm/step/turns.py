"""Work on several batches at once, where a device would wait for other processes between one part and the next."""

from collections.abc import Iterable, Iterator


def take_turns(works: Iterable[Iterator[None]]) -> None:
    """Do all of some works, which yield where they wait.

    Each begins before those before it go on, which have waited for longer. So it launches what the device does while
    they wait, and no more than a few are in progress. On every process, all take the same turns.
    """
    waiting: list[Iterator[None]] = []
    for work in works:
        waiting = _further([work, *waiting])
    while waiting:
        waiting = _further(waiting)


def _further(works: Iterable[Iterator[None]]) -> list[Iterator[None]]:
    """Let each of some works go on, and return those that wait again."""
    return [work for work in works if next(work, "done") is None]
