"""Strategies on real cards, through NCCL: two where there are two, otherwise one process on one card."""

import pytest
import torch
import yaml
from jobs import HALF, STEPS
from launch import run_processes
from test_equality import QUICK, assert_one_device
from test_trainer import assert_one_device as assert_resumed
from test_trainer import fits

from benchmarks import recipe_memory, recipe_sharded

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
def test_equals_one_device(strategy, tmp_path):
    assert_one_device(strategy, CARDS, tmp_path, QUICK)


def test_replayed_steps_of_shards_are_those_that_are_launched():
    """Also with rows of pieces that only some processes hold, and with other learning rates and gradients."""
    run_processes("run_recorded.py", CARDS)


def test_saved_and_resumed_by_the_trainer(tmp_path):
    """Lightning's own FSDP1, which it keeps from a CPU, among others."""
    job = {"job": "gpt block"}
    strategies = ("ddp", "fsdp1 full", "fsdp1 sharded", "fsdp2 full", "fsdp2 sharded")
    saves = [{"strategy": strategy, "steps": HALF, "save": strategy} for strategy in strategies]
    loads = [
        {"strategy": strategy, "steps": STEPS, "load": f"{origin}.ckpt", "weights": f"{strategy} from {origin}.pt"}
        for origin in strategies
        for strategy in strategies
        if "sharded" not in origin or origin.split()[0] == strategy.split()[0]
    ]
    fits(tmp_path, CARDS, *(job | each for each in saves + loads))
    assert_resumed(tmp_path, "gpt block", [each["weights"] for each in loads])


def test_the_recipe_for_several_cards_trains_saves_and_resumes(tmp_path):
    """Llama-3-8B's, shrunk. Attention's backward pass adds in any order."""
    config = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_query_groups": 2, "vocab_size": 1000, "block_size": 128}
    sizes = {"model_name": None, "config": config, "max_seq_length": 128, "adapm": {"lr": 1e-2}}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": sizes}}))
    folder = recipe_memory.RECIPES / "trainer/finetune"
    recipes = [folder / "llama-3-8b-full.yaml", folder / "llama-3-8b-full-fsdp2.yaml", path]
    result = recipe_sharded.measure(recipe_sharded.read(recipes, CARDS), CARDS, "cuda")
    assert result["resumed_losses"] == pytest.approx(result["losses"][recipe_sharded.SAVED :], rel=1e-2)
    assert result["losses"][-1] < 0.9 * result["losses"][0]
