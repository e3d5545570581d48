"""What an optimizer keeps on its device from step to step is its own."""

import copy
import gc
import weakref

import torch
from models import PlainLM, token_batches, train

from lightning_adapm import AdaPM
from lightning_adapm.moments import lowrank
from lightning_adapm.moments.cache import DeviceCache, kept, using
from lightning_adapm.report.plan import cached_bytes


def trained():
    model = PlainLM()
    optimizer = AdaPM(model.parameters(), rank=2, momentum="compact", update_proj_gap=1)
    train(model, optimizer, token_batches(2))
    return optimizer


def test_starts_of_refreshes_are_kept_once_per_optimizer_counted_and_freed_with_it(monkeypatch):
    made, starting_rows = [], lowrank.starting_rows

    def counted(*args):
        rows = starting_rows(*args)
        made.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(lowrank, "starting_rows", counted)
    one, other = trained(), trained()
    shapes = {part.shape[-1] for param in one.pieces for part in one.parts(param) if part.first.has_basis}
    assert len(made) == 2 * len(shapes)  # not once per step
    assert 0 < one.cached_bytes() == other.cached_bytes() <= cached_bytes(one)
    assert copy.deepcopy(other).cached_bytes() == 0
    del one, other
    gc.collect()
    assert not any(reference() is not None for reference in made)


def test_the_cache_is_bounded_and_that_of_the_step_that_runs(monkeypatch):
    monkeypatch.setattr("lightning_adapm.moments.cache.MOST", 2)
    cache = DeviceCache()
    with using(cache):
        first = kept("a", lambda: torch.zeros(3))
        kept("b", lambda: (torch.zeros(5), True))
        assert kept("a", lambda: torch.ones(3)) is first
        kept("c", lambda: torch.zeros(7))
    assert cache.nbytes == 4 * (3 + 7)
    assert kept("a", lambda: torch.ones(3)) is not first
