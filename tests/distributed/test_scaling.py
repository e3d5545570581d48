"""The bytes that docs/distributed.md states: on paper, and as counted on real processes."""

import json

import pytest
import torch
from jobs import JOBS
from launch import run_processes
from litgpt import GPT, Config

from lightning_adapm import AdaPM
from lightning_adapm.report.scaling import scaling


@pytest.mark.parametrize("basis", ["replicate", "shard"])
def test_counted_bytes_are_those_on_paper(basis, tmp_path):
    run_processes("run_traffic.py", 4, tmp_path / "traffic.json", basis)
    counted = json.loads((tmp_path / "traffic.json").read_text())
    job = JOBS["gpt float32"]
    paper = scaling(job.optimizer(job.build()), 4, basis)
    gap = job.settings["update_proj_gap"]
    after_first = counted["exchanged"][1 : 1 + gap]  # the first step also finds out where there is a gradient
    assert min(after_first) == paper.step
    assert len(after_first) == gap and sum(after_first) == gap * paper.step + paper.refresh
    # not each process's: of a fused weight, those with the value's rows have all of its full momentum
    assert sum(counted["kept"]) == pytest.approx(4 * paper.momentum, rel=0.0 if basis == "replicate" else 0.02)


def test_large_model_on_paper():
    """What is saved, and what is exchanged beside the gradients, on up to 1,024 processes."""
    with torch.device("meta"):
        model = GPT(Config.from_name("Llama-3-8B"))
    optimizer = AdaPM(model.named_parameters(), momentum="paper", rank=0.05, state_dtype=None)  # as the page says
    for world_size in (1, 2, 3, 4, 8, 64, 1024):
        cost = scaling(optimizer, world_size, "replicate" if world_size <= 2 else "shard")  # as auto chooses
        assert cost.saved >= 0.9
        assert cost.step <= (0.001 if cost.basis == "replicate" else 0.025) * cost.gradients
        # what every process makes orthonormal by itself, or a share that it then gives to the others
        assert cost.refresh <= (0.025 if cost.basis == "replicate" else 0.05) * cost.gradients
