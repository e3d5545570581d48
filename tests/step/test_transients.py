"""Bounds of a step's temporaries against what a step allocates: it takes all paths of kernels, which do nothing."""

import pytest
import torch
from allocations import transient_of_a_step
from torch import nn

from lightning_adapm import AdaPM
from lightning_adapm.step import averages, bases, batching, kernels, moves, reading, refreshing, transients
from lightning_adapm.step.transients import held_by_recorded_steps


@pytest.fixture
def traced(monkeypatch):
    """Steps as on a GPU, of a model that is as much smaller as limits are."""
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    for module in (averages, bases, moves, reading):
        monkeypatch.setattr(module, "launch", lambda *args, **kwargs: None)
    for limits, size in ((batching._UNCOPIED_NUMEL, 1 << 20), (batching._REFRESHED_NUMEL, 1 << 19)):
        monkeypatch.setitem(limits, "cpu", size)
        monkeypatch.setitem(limits, "cuda", size)
    for module in (refreshing, transients):
        monkeypatch.setattr(module, "TOGETHER_NUMEL", 1 << 15)
        monkeypatch.setattr(module, "TOGETHER_OF_SHARDS", 1 << 15)


@pytest.mark.parametrize("table", [512, 8192])
@pytest.mark.parametrize(
    "options", [{"second_moment": "factored"}, {"second_moment": "block", "state_dtype": None, "update_proj_gap": 3}]
)
def test_recorded_steps_hold_what_their_bound_says(traced, options, table):
    """No more, and nearly as much, whether most is held for a table of tokens or while all blocks are refreshed."""
    shapes = {"gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512), "o_proj": (256, 256)}
    weights = {f"layers.{i}.mlp.{name}.weight": shape for i in range(6) for name, shape in shapes.items()}
    named = [
        (name, nn.Parameter(torch.zeros(shape))) for name, shape in [*weights.items(), ("embed.weight", (table, 256))]
    ]
    optimizer = AdaPM(named, rank=0.1, momentum="compact", **{"update_proj_gap": 4} | options)
    for _, param in named:
        param.grad = torch.zeros_like(param)
        optimizer._make_state(param)
        for part in optimizer.parts(param):
            optimizer.state[param][part.prefix + "seeded"] = 1
    optimizer.step()  # makes what is kept from step to step
    peaks = [transient_of_a_step(optimizer) for _ in range(8)]
    bound = held_by_recorded_steps([part for _, param in named for part in optimizer.parts(param)])
    assert bound / 1.7 < max(peaks) <= bound, peaks
