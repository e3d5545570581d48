"""State saved on some processes under one strategy, loaded on others under another: the same training goes on."""

import os

import pytest
import torch
from filelock import FileLock
from jobs import JOBS
from launch import run_processes
from models import relative_difference
from test_equality import one_device

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NAMES = ("gpt elementwise", "transposed block", "plain factored", "odd elementwise", "plain lora-pre")
NAMES += ("gqa partial muon", "gpt int8", "gpt extending")
FEW = ("transposed block", "gqa partial muon", "gpt int8")
"""Jobs for what only repeats other files: DDP saves what one device does, and so do full files, except FSDP1's."""
SAVED_BY = (("single", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), ("fsdp1", 3), ("fsdp2", 3))


CUTTING = ("fsdp1", "hybrid1")
"""Strategies that cut rows, and stacks of matrices."""


def jobs_of(strategy):
    """Jobs whose checkpoints a strategy saves."""
    names = FEW if strategy == "ddp" else NAMES
    return [name for name in names if strategy not in CUTTING or not name.startswith("odd")]


def files(strategy, origin):
    """Files of an origin that a strategy loads, each with its job: sharded ones where AdamW's are."""
    saved_by = origin.split()[0]
    for name in jobs_of(saved_by):
        if strategy in CUTTING and name.startswith("odd"):
            continue
        if (saved_by in CUTTING) == (strategy in CUTTING):
            yield f"{origin} {name}", name
        if saved_by in ("single", *CUTTING) or name in FEW:
            yield f"{origin} {name}.pt", name


def differences(weights, name):
    """In units of the job's tolerance."""
    whole, tolerance = one_device(name), JOBS[name].tolerance
    return {key: relative_difference(weights[key], expected) / tolerance for key, expected in whole.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints at half of every job, sharded and full, of every strategy. Workers of pytest-xdist share them."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "checkpoints"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            making = folder.with_suffix(".making")
            making.mkdir(exist_ok=True)
            for strategy, world_size in SAVED_BY:
                actions = [f"save:{strategy}:{name}:{strategy} on {world_size} {name}" for name in jobs_of(strategy)]
                run_processes("run_checkpoints.py", world_size, making, *actions)
            making.rename(folder)
    return folder


# From another strategy, torch itself gives FSDP1 what it has cut up as if it had the parameter's shape.
@pytest.mark.parametrize(
    ("strategy", "world_size", "origins"),
    [
        ("single", 1, ("single on 1", "ddp on 2", "fsdp1 on 2", "fsdp2 on 2", "fsdp1 on 3", "fsdp2 on 3")),
        ("ddp", 2, ("single on 1", "ddp on 2", "fsdp1 on 2", "fsdp2 on 3")),
        ("fsdp2", 4, ("single on 1", "ddp on 2", "fsdp2 on 2")),
        ("fsdp2", 2, ("fsdp2 on 3",)),
        ("fsdp1", 3, ("fsdp1 on 2",)),
        ("fsdp1", 2, ("fsdp1 on 3",)),
        ("hybrid2", 4, ("single on 1", "fsdp2 on 2")),
        ("hybrid1", 4, ("fsdp1 on 2",)),
    ],
)
def test_between_strategies_and_world_sizes(saved, strategy, world_size, origins):
    """Through torch.distributed.checkpoint; full files are loaded by every strategy, sharded ones where AdamW's are."""
    actions, outputs = [], []
    for file, name in (each for origin in origins for each in files(strategy, origin)):
        outputs.append((f"{strategy} from {file}", name))
        actions.append(f"load:{strategy}:{name}:{file}:{outputs[-1][0]}")
    run_processes("run_checkpoints.py", world_size, saved, *actions)
    found = {
        f"{output}: {key}": value
        for output, name in outputs
        for key, value in differences(torch.load(saved / output), name).items()
    }
    assert found
    assert not {key: value for key, value in found.items() if not value <= 1}
