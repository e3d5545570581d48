"""Strategies on real cards, through NCCL: two where there are two, otherwise one process on one card."""

import pytest
import torch
from test_equality import QUICK, assert_one_device
from test_trainer import assert_one_device as assert_resumed
from test_trainer import fits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CARDS = min(2, torch.cuda.device_count())


@pytest.fixture(autouse=True)
def on_cuda(monkeypatch):
    monkeypatch.setenv("STRATEGIES_ON", "cuda")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp1 late", "fsdp2", "fsdp2 of checkpointed"])
def test_equals_one_device_on_a_cpu(strategy, tmp_path):
    assert_one_device(strategy, CARDS, tmp_path, QUICK)


def test_saved_and_resumed_by_the_trainer(tmp_path):
    """Lightning's own FSDP1, which it keeps from a CPU, among others."""
    job = {"job": "gpt block"}
    strategies = ("ddp", "fsdp1 full", "fsdp1 sharded", "fsdp2 full", "fsdp2 sharded")
    saves = [{"strategy": strategy, "steps": 6, "save": strategy} for strategy in strategies]
    loads = [
        {"strategy": strategy, "steps": 12, "load": f"{origin}.ckpt", "weights": f"{strategy} from {origin}.pt"}
        for origin in strategies
        for strategy in strategies
        if "sharded" not in origin or origin.split()[0] == strategy.split()[0]
    ]
    fits(tmp_path, CARDS, *(job | each for each in saves + loads))
    assert_resumed(tmp_path, "gpt block", [each["weights"] for each in loads])
