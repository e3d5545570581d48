"""Bytes that the benchmarks count, against sizes that are known."""

import gc
import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import peak_memory, scaling
from benchmarks.costs.memory import AllocationTracker, held_bytes
from benchmarks.costs.models import numel
from benchmarks.costs.peers import chosen
from benchmarks.costs.training_step import PARTS, Setting, free, measure
from benchmarks.peak_memory import byte_count, deepest
from benchmarks.studies.decoder import Decoder, Shape

TINY = Shape(layers=2, width=32, n_head=4, n_query_groups=2, context=16, vocab=64, llama=True)
SETTING = Setting("cpu", torch.float32, batch=2, length=16)
ADAMW, FUSED, IN_BACKWARD = chosen("AdamW")[0], chosen("fused")[0], chosen("in backward")[0]


def test_the_tracker_knows_what_is_alive_and_what_it_is():
    held = torch.zeros(100)
    tracker = AllocationTracker({"held": [held, held[:10]]})
    with tracker.following():
        a = torch.zeros(1000)
        with tracker.counting("activations"):
            b = a + 1
        del a
        held.add_(1)
        c = b.view(10, 100) * 2
        tracker.claim(c, "gradients")
        d = c[0]  # a view
        del b, c
        torch.zeros(500)
    assert tracker.peak == Counter(held=400, activations=4000, gradients=4000)
    assert tracker.operations == 7
    assert held_bytes([d, d]) == 4000
    tracker.begin({"gradients": [d]})
    with tracker.following():
        torch.zeros(10)
    assert tracker.peak == Counter(gradients=4000, transient=40)


def test_the_parts_of_a_step_are_those_of_adamw():
    size = 4 * numel(TINY)
    parts = measure(TINY, FUSED, replace(SETTING, batch=1, length=1), checkpointing=False)
    assert parts["parameters"] == size and parts["gradients"] == size
    assert parts["state"] == parts["all_state"] == 2 * size + 4 * len(list(Decoder(TINY).parameters()))
    assert parts["peak"] == sum(parts[part] for part in PARTS)
    assert parts["transient"] + parts["activations"] < 0.1 * size
    unfused = measure(TINY, ADAMW, replace(SETTING, batch=1, length=1), checkpointing=False)
    largest = 4 * max(param.numel() for param in Decoder(TINY).parameters())
    assert largest <= unfused["transient"] - parts["transient"] <= 3 * largest


def test_checkpointing_and_updates_in_backward_save_what_they_are_for():
    long = replace(SETTING, batch=16)
    plain, recomputed = (measure(TINY, FUSED, long, checkpointing) for checkpointing in (False, True))
    assert recomputed["activations"] < 0.7 * plain["activations"] and recomputed["peak"] < plain["peak"]
    early = measure(TINY, IN_BACKWARD, SETTING, checkpointing=True)
    late = measure(TINY, chosen("AdaPM block")[0], SETTING, checkpointing=True)
    assert early["gradients"] < 0.5 * late["gradients"] == 0.5 * 4 * numel(TINY)


def test_nothing_of_a_step_is_left():
    def alive():
        free("cpu")
        return sum(issubclass(type(found), nn.Module) for found in gc.get_objects())

    before = alive()
    measure(TINY, IN_BACKWARD, SETTING, checkpointing=True)
    assert alive() == before


@pytest.mark.parametrize("peer", [FUSED, IN_BACKWARD], ids=lambda peer: peer.name)
def test_the_deepest_model_fits_and_one_more_layer_does_not(peer):
    budget = measure(replace(TINY, layers=6), peer, SETTING, checkpointing=False)["peak"] + 1000
    found = deepest(TINY, peer, SETTING, False, budget)
    assert found["layers"] == 6 and found["peak"] <= budget
    assert found["parameters"] == numel(replace(TINY, layers=6))
    assert deepest(TINY, peer, SETTING, False, 1000) == {"layers": 0, "parameters": 0, "peak": 0}


def test_a_budget_is_a_number_with_a_unit():
    assert byte_count("24GiB") == 24 * 2**30 and byte_count("0.5MiB") == 2**19
    for wrong in ("24", "24 GB", "manyGiB"):
        with pytest.raises(Exception, match="such as 24GiB, but got"):
            byte_count(wrong)


def test_the_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peak_memory, "MODELS", {"llama": TINY})
    monkeypatch.setitem(sys.modules, "adam_mini", None)
    words = ["peak_memory", "--peers", "fused", "adam_mini", "AdamMini", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*words, "--batch", "1", "--length", "16", "--budget", "1MiB"])
    peak_memory.main()
    page = (tmp_path / "peak_memory-cpu-llama-float32.md").read_text()
    assert page in capsys.readouterr().out
    assert "| AdamMini |" in page and "| adam_mini | skipped: not importable" in page and "within 1.0 MiB" in page
    assert len(list(tmp_path.glob("*.svg"))) == 2

    monkeypatch.setattr(sys, "argv", ["peak_memory", "--budget", "9000TiB"])
    with pytest.raises(SystemExit):
        peak_memory.main()
    assert "--budget must be at most" in capsys.readouterr().err


@pytest.mark.slow
def test_counted_on_processes_is_what_is_computed(monkeypatch, tmp_path, capsys):
    """By the command, which trains on one, two and four processes."""
    monkeypatch.setattr(sys, "argv", ["scaling", "--output", str(tmp_path)])
    scaling.main()
    page = (tmp_path / "scaling.md").read_text()
    assert page in capsys.readouterr().out and page.count("| 2 | shard |") == 2
    rows = json.loads((tmp_path / "scaling.json").read_text())["counted"]
    assert [(row["processes"], row["basis"]) for row in rows] == [
        (size, basis) for size in (1, 2, 4) for basis in scaling.bases(size)
    ]
    for row in rows:
        counted, paper = row["counted"], row["paper"]
        assert sum(counted["kept"]) == row["processes"] * paper["momentum"]
        exchanged = (paper["step"], paper["refresh"]) if row["processes"] > 1 else (0, 0)
        assert (counted["step"], counted["refresh"]) == exchanged
