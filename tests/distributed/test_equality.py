"""One property, every strategy: the weights are those that one device gives."""

import functools

import pytest
import torch
from jobs import JOBS, train_share
from launch import run_processes
from models import relative_difference


@functools.cache
def one_device(name):
    job = JOBS[name]
    model = job.build()
    train_share(model, job.optimizer(model), job.batches())
    return dict(model.named_parameters())


@pytest.fixture(scope="module", params=[2, 4])
def world_size(request):
    return request.param


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_equals_one_device(strategy, world_size, tmp_path):
    run_processes(
        "run_jobs.py",
        world_size,
        strategy,
        tmp_path / "weights.pt",
        *(name for name in JOBS if strategy != "fsdp1" or not name.startswith("odd")),
    )
    differences = {}
    for name, weights in torch.load(tmp_path / "weights.pt").items():
        for key, expected in one_device(name).items():
            differences[f"{name}: {key}"] = relative_difference(weights[key], expected)
    assert differences
    assert not {key: value for key, value in differences.items() if value > 1e-9}
