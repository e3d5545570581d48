"""One property, every strategy: the weights are those that one device gives."""

import functools

import pytest
import torch
from jobs import JOBS
from launch import run_processes
from models import relative_difference
from strategies import WRAP, on_cuda

pytestmark = pytest.mark.timeout(900)


@functools.cache
def one_device(name, device="cpu"):
    job = JOBS[name]
    model = job.build().to(device)
    optimizer = job.train(model)
    assert bool(optimizer.nonfinite_gradients()) == bool(job.broken)
    return dict(model.named_parameters())


def assert_one_device(strategy, world_size, folder, names):
    run_processes("run_jobs.py", world_size, strategy, folder / "weights.pt", *names)
    differences = {}
    for name, weights in torch.load(folder / "weights.pt").items():
        job = JOBS[name]
        # below float64, kernels round as no CPU does
        device = "cuda" if on_cuda() and job.dtype != torch.float64 else "cpu"
        for key, expected in one_device(name, device).items():
            differences[f"{name}: {key}"] = relative_difference(weights[key], expected.cpu()) / job.tolerance
    assert differences
    assert not {key: value for key, value in differences.items() if not value <= 1}


QUICK = (
    "gpt block",
    "plain factored",
    "gpt broken",
    "gated broken",
    "gpt state dtypes",
    "gpt int8",
    "transposed elementwise",
    "positions block",
    "gpt adalomo",
    "plain lora-pre",
    "gqa partial muon",
    "gpt broken muon",
    "gpt lora-pre muon",
    "gpt extending",
    "gpt rounding",
    "transposed rounding",
    "gqa accumulated",
    "gpt accumulated muon",
)
ZERO = ("gpt zero", "gqa zero muon", "gpt zero lomo")
# FSDP1 and DDP themselves do not unfreeze, and FSDP1 cuts up stacks
QUICK_ON = {
    ("fsdp1", 2): QUICK + ZERO,
    ("fsdp1 late", 3): QUICK,
    ("fsdp2", 3): (*QUICK, "plain unfrozen", "experts broken"),
}


@pytest.mark.parametrize(("strategy", "world_size"), QUICK_ON)
def test_equals_one_device(strategy, world_size, tmp_path):
    assert_one_device(strategy, world_size, tmp_path, QUICK_ON[strategy, world_size])


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_a_strategy_of_one_process(strategy, tmp_path):
    """Its parameters are sharded, into one part each."""
    assert_one_device(strategy, 1, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["hybrid1", "hybrid2"])
def test_hybrid_sharding(strategy, tmp_path):
    """Sharded on two processes, replicated on two such pairs: litgpt pretrains with FSDP1's HYBRID_SHARD."""
    assert_one_device(strategy, 4, tmp_path, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [strategy for strategy in WRAP if " " in strategy])
def test_wrapped(strategy, tmp_path):
    """torch.compile, activation checkpointing and meta devices, around a strategy or inside."""
    names = ["plain block", "gated elementwise"]
    if "meta" not in strategy:  # which unties the head and forgets buffers
        names += ["transposed factored", "gpt block"]
    assert_one_device(strategy, 2, tmp_path, names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "world_size"), [("fsdp2", 3), ("fsdp1", 3), ("fsdp2", 2), ("fsdp1", 2), ("ddp", 2)]
)
def test_every_other_job_equals_one_device(strategy, world_size, tmp_path):
    # some are for other tests, and FSDP1 cuts up stacks
    others = ("gpt float32", "gpt long", "plain unfrozen", *ZERO, *QUICK_ON.get((strategy, world_size), ()))
    names = [
        name
        for name in JOBS
        if name not in others and (strategy != "fsdp1" or name.split()[0] not in ("odd", "experts"))
    ]
    assert_one_device(strategy, world_size, tmp_path, names)
