"""The order in which batches of shards are read and moved: something is to be done while others are exchanged."""

from types import SimpleNamespace

import pytest
import torch

from lightning_adapm.moments.first import FullMomentum, LowRankMomentum
from lightning_adapm.moments.orthogonal import Orthogonal
from lightning_adapm.moments.second import NoSecondMoment
from lightning_adapm.step import exchange
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.paths import Path

FULL, NONE = FullMomentum(0.9), NoSecondMoment()


def batch(rows, first=FULL, second=NONE, reduction=None):
    shard = SimpleNamespace(most=rows // 2, width=4)
    part = SimpleNamespace(shard=shard, shape=torch.Size((rows, 4)), first=first, second=second)
    return Batch([part], [], SimpleNamespace(), 1, Path("kernels", ""), reduction)


def test_exchanged_matrices_move_first_and_small_ones_before_large_ones(monkeypatch):
    """Products with bases bound a round; of other gradients nothing large is kept."""
    monkeypatch.setattr(exchange, "ROUND_NUMEL", 48)
    low_rank = LowRankMomentum(0.9, 2, 4)
    table, norm, mlp = batch(64), batch(2), batch(16, low_rank)
    large, small = batch(8, low_rank, Orthogonal()), batch(4, low_rank, Orthogonal())
    assert list(exchange.rounds([table, large, mlp, norm, small])) == [[small, large, norm], [mlp, table]]


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_read_while_bases_of_others_are_gathered(monkeypatch, shared):
    log = []

    class Gathering:
        def gather_columns(self, stacks, widths):
            (name,) = stacks
            return [name] if shared else [], lambda: [f"all of {name}"]

    monkeypatch.setattr(exchange, "join", "/".join)
    monkeypatch.setattr(LowRankMomentum, "bases", lambda self, parts: [f"{part.shape[0]}" for part in parts])
    monkeypatch.setattr(exchange, "Pending", list)
    monkeypatch.setattr(exchange, "begin_and_wait", lambda begun, awaited: log.append((begun, awaited)))
    monkeypatch.setattr(exchange, "_grads", lambda batch: batch.grads)
    monkeypatch.setattr(
        exchange, "_read", lambda batch: log.append(getattr(batch.grads, "right", batch.parts[0].shape[0]))
    )
    monkeypatch.setattr(exchange, "_group", lambda batch: None)
    monkeypatch.setattr(exchange, "_agree", len)
    low_rank = [batch(rows, LowRankMomentum(0.9, 2, 4), reduction=Gathering()) for rows in (8, 6)]
    exchange.begin([low_rank[0], batch(4), low_rank[1], batch(2)])
    begun, waits = ([(["8"], None), (["6"], None)], [[(None, ["8"])], [(None, ["6"])]]) if shared else ([], [[], []])
    assert log == [*begun, 4, 2, *waits[0], "all of 8", *waits[1], "all of 6"]
