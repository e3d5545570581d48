"""Checkpoints of the Trainer, under every strategy, full and sharded, resumed under every other that AdamW's can be."""

import json
import random
import time

import pytest
import torch
from jobs import HALF, STEPS
from launch import run_processes, started
from models import relative_difference
from test_equality import one_device

pytestmark = pytest.mark.timeout(900)

STRATEGIES = ("ddp", "fsdp1 full", "fsdp1 sharded", "fsdp2 full", "fsdp2 sharded")


def can_load(origin, strategy):
    """As Lightning has it for ``torch.optim.AdamW``: a sharded checkpoint is for the strategy that wrote it."""
    return "sharded" not in origin or origin.split()[0] == strategy.split()[0]


def fits(folder, world_size, *fits, **options):
    run_processes("run_trainer.py", world_size, folder, *map(json.dumps, fits), **options)


def assert_one_device(folder, job, files, tolerance=1e-9):
    found = {}
    for file in files:
        weights = torch.load(folder / file)
        for key, expected in one_device(job).items():
            found[f"{file}: {key}"] = relative_difference(weights[key], expected)
    assert found
    assert not {key: value for key, value in found.items() if not value <= tolerance}


def test_callbacks_report_what_they_do_on_one_device(tmp_path):
    job = {"job": "gpt block", "steps": 6}
    fits(tmp_path, 1, job | {"strategy": "single", "log": "single.json"})
    strategies = ("ddp", "fsdp1 full", "fsdp2 full")
    fits(tmp_path, 4, *(job | {"strategy": strategy, "log": f"{strategy}.json"} for strategy in strategies))
    logs = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("single", *strategies)}
    whole = logs["single"]["state"][-1][1]
    for name in strategies:
        assert [step for step, _ in logs[name]["residual"]] == [0, 3]
        for (_, ours), (_, expected) in zip(logs[name]["residual"], logs["single"]["residual"], strict=True):
            assert ours == pytest.approx(expected, rel=1e-6)
        state = logs[name]["state"][-1][1]
        assert state["optimizer/total_bytes_all_processes"] == pytest.approx(4 * state["optimizer/total_bytes"])
        if name == "ddp":
            assert state["optimizer/total_bytes"] == whole["optimizer/total_bytes"]
        else:
            counters = 4 * 22  # each process counts the steps of all parameters
            adamw = whole["optimizer/adamw_bytes"] - counters
            assert 4 * (state["optimizer/adamw_bytes"] - counters) == pytest.approx(adamw)
            assert state["optimizer/total_bytes"] < whole["optimizer/total_bytes"] / 2


def test_saved_under_one_sharding_resumed_under_the_other(tmp_path):
    job = {"job": "gpt block"}
    saved = [{"strategy": s, "steps": HALF, "save": s} for s in ("fsdp1 full", "fsdp2 full")]
    resumed = [
        {"strategy": new, "steps": STEPS, "load": f"{old}.ckpt", "weights": f"{new}.pt"}
        for new, old in (("fsdp1 sharded", "fsdp2 full"), ("fsdp2 sharded", "fsdp1 full"))
    ]
    fits(tmp_path, 2, *(job | each for each in saved + resumed))
    assert_one_device(tmp_path, "gpt block", [each["weights"] for each in resumed])


CLIP_VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}
CLIP_NORM = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "norm"}


@pytest.mark.slow
def test_accumulation_and_clipping(tmp_path):
    """FSDP1 under the Trainer refuses to clip by norm, whatever the optimizer."""
    cases = {"accumulate": {"accumulate_grad_batches": 2}, "value": CLIP_VALUE, "norm": CLIP_NORM}
    runs = [
        {
            "strategy": strategy,
            "job": "gpt block",
            "steps": HALF,
            "trainer": options,
            "weights": f"{strategy} {name}.pt",
        }
        for strategy in ("single", "ddp", "fsdp1 full", "fsdp2 full")
        for name, options in cases.items()
        if (strategy, name) != ("fsdp1 full", "norm")
    ]
    fits(tmp_path, 1, *(run for run in runs if run["strategy"] == "single"))
    fits(tmp_path, 2, *(run for run in runs if run["strategy"] != "single"))
    for run in runs:
        name = run["weights"].rpartition(" ")[2]
        weights, expected = torch.load(tmp_path / run["weights"]), torch.load(tmp_path / f"single {name}")
        for key in expected:
            assert relative_difference(weights[key], expected[key]) <= 1e-9, (run["weights"], key)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "floor"), [("32-true", 1e-4), ("bf16-mixed", 1e-3), ("bf16-true", 1e-3)])
def test_precision(tmp_path, precision, floor):
    """Rounding depends on how a batch is shared out: AdamW, too, differs from itself on one device.

    AdaPM may differ by 30 times as much, for a rotated subspace adds up what AdamW forgets; ``floor`` is for tensors in
    which AdamW happens to differ by next to nothing.
    """
    runs = [
        {
            "strategy": strategy,
            "job": "gpt float32",
            "steps": STEPS,
            "optimizer": optimizer,
            "trainer": {"precision": precision},
        }
        | {"weights": f"{strategy} {optimizer}.pt"}
        for strategy in ("single", "ddp", "fsdp1 full", "fsdp2 full")
        for optimizer in ("adapm", "adamw")
    ]
    fits(tmp_path, 1, *runs[:2])
    fits(tmp_path, 2, *runs[2:])
    weights = {run["weights"].removesuffix(".pt"): torch.load(tmp_path / run["weights"]) for run in runs}
    for strategy in ("ddp", "fsdp1 full", "fsdp2 full"):
        ours, theirs = (
            [relative_difference(w, weights[f"single {name}"][key]) for key, w in weights[f"{strategy} {name}"].items()]
            for name in ("adapm", "adamw")
        )
        assert max(ours) <= max(floor, 30 * max(theirs)), strategy


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1 full", "fsdp2 full"])
@pytest.mark.parametrize("victims", [[0], [1], [0, 1]], ids=["first", "second", "both"])
def test_killed_and_resumed(tmp_path, strategy, victims):
    """SIGKILL at any moment, of training or of saving: the last complete checkpoint goes on to the same weights."""
    run = {"strategy": strategy, "job": "gpt long", "steps": 40}
    generator = random.Random(f"{strategy} {victims}")
    with started("run_trainer.py", 2, tmp_path, json.dumps(run | {"every": 1})) as (processes, outputs):
        end = time.monotonic() + 120
        while not list(tmp_path.glob("*.ckpt")) and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(generator.uniform(0.0, 1.5))
        alive = [process.is_alive() for process in processes]
        for victim in victims:
            processes[victim].kill()
    assert alive == [True, True], outputs
    last = max(filter(loads, tmp_path.glob("step=*.ckpt")), key=lambda path: int(path.stem[5:]))
    fits(tmp_path, 2, run | {"load": last.name, "weights": "weights.pt"})
    assert_one_device(tmp_path, "gpt long", ["weights.pt"])


def loads(path):
    """Whether a checkpoint is all there, and without code in it."""
    try:
        return bool(torch.load(path, weights_only=True))
    except (EOFError, OSError, RuntimeError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("job", ["gpt block"])
def test_resumed_under_any_strategy(tmp_path, job):
    origins = {"single": 1} | dict.fromkeys(STRATEGIES, 2)
    for world_size in (1, 2):
        saves = [
            {"strategy": origin, "job": job, "steps": HALF, "save": f"{origin} of {size}"}
            for origin, size in origins.items()
            if size == world_size
        ]
        fits(tmp_path, world_size, *saves)
    files = []
    # on four, how a strategy saves is left out: checkpoints are loaded by what they are, as those on two show
    loaded_by = {
        1: ("single", "fsdp1 full", "fsdp2 full", "fsdp2 sharded"),
        2: STRATEGIES,
        4: ("ddp", "fsdp1 full", "fsdp2 full"),
    }
    for world_size, strategies in loaded_by.items():
        loads = []
        for strategy in strategies:
            for origin, size in origins.items():
                if can_load(origin, strategy):
                    files.append(f"{strategy} of {world_size} from {origin} of {size}.pt")
                    load = {"load": f"{origin} of {size}.ckpt", "weights": files[-1]}
                    loads.append({"strategy": strategy, "job": job, "steps": STEPS, **load})
        fits(tmp_path, world_size, *loads)
    assert_one_device(tmp_path, job, files)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adapm", "adamw"])
def test_a_sharded_checkpoint_is_for_its_own_strategy(tmp_path, optimizer):
    """Lightning refuses the others whatever the optimizer: nothing that AdamW can do is missing here."""
    job = {"job": "gpt block", "optimizer": optimizer}
    saves = [job | {"strategy": origin, "steps": HALF, "save": origin} for origin in ("fsdp1 sharded", "fsdp2 sharded")]
    refused = [
        job | {"strategy": strategy, "steps": STEPS, "load": f"{origin}.ckpt", "refused": True}
        for origin in ("fsdp1 sharded", "fsdp2 sharded")
        for strategy in ("single", *STRATEGIES)
        if not can_load(origin, strategy)
    ]
    fits(tmp_path, 2, *saves, *(load for load in refused if load["strategy"] != "single"))
    fits(tmp_path, 1, *(load for load in refused if load["strategy"] == "single"))
