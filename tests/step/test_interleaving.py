"""The order of tasks that wait for other processes in between."""

from itertools import pairwise

import pytest

from lightning_adapm.step import interleaving


def task(number, parts, log):
    for part in range(parts):
        log.append(f"{number}{'abc'[part]}")
        if part < parts - 1:
            yield f"{number}{'abc'[part]}"


def order(parts, monkeypatch):
    """What is launched, and in between what begins and what is waited for."""
    log = []
    monkeypatch.setattr(interleaving, "Pending", lambda planned: planned)
    monkeypatch.setattr(
        interleaving, "begin_and_wait", lambda begun, awaited: log.append(f"({begun or ''}>{awaited or ''})")
    )
    interleaving.interleave(task(number, each, log) for number, each in enumerate(parts))
    return log


def test_what_waits_does_so_beside_others(monkeypatch):
    assert order([3, 3, 3], monkeypatch) == (
        "0a (0a>) 1a (1a>0a) 0b (0b>) 2a (2a>1a) 1b (1b>0b) 0c (>2a) 2b (2b>1b) 1c (>2b) 2c".split()
    )


@pytest.mark.parametrize("parts", [[1, 1], [3], [3, 3], [1, 3, 1, 3], [2, 3, 1, 3]])
def test_collectives_never_follow_one_another(monkeypatch, parts):
    """A graph between them would be empty."""
    log = order(parts, monkeypatch)
    assert all(one[0] != "(" or other[0] != "(" for one, other in pairwise(log))
    assert sum(each[0] != "(" for each in log) == sum(parts)
    assert ("(" in "".join(log)) == any(each > 1 for each in parts)
