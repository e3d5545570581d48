"""A recipe is measured as it trains, next to AdamW; here on the CPU, which has no allocator to ask."""

import pytest
import torch
import yaml

from benchmarks import recipe_memory, recipe_sharded, recipe_training
from lightning_adapm import AdaPM

MODEL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 60, "padded_vocab_size": 64, "block_size": 16}
ADAPM = {"second_moment": "block", "state_dtype": "bfloat16", "update_in_backward": True, "update_proj_gap": 20}
ARGUMENTS = {"config": MODEL, "checkpoint_dir": "missing", "max_seq_length": 8, "lm_head_chunk_size": 4, "adapm": ADAPM}


@pytest.mark.parametrize("name", recipe_training.OPTIMIZERS)
def test_a_recipe_is_measured(tmp_path, name, monkeypatch):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"precision": "bf16-true"}, "model": {"init_args": ARGUMENTS}}))
    made = []
    make = recipe_training.OPTIMIZERS[name]
    monkeypatch.setitem(recipe_training.OPTIMIZERS, name, lambda module: made.append(make(module)) or made[-1])
    row = recipe_training.measure(path, name, device="cpu", timed=1)
    assert len(row["seconds"]) == recipe_training.WATCHED + 1
    assert row["tokens_per_second"] == pytest.approx(8 / row["seconds"][-1])
    assert {param.dtype for param in made[0].param_groups[0]["params"]} == {torch.bfloat16}
    assert isinstance(made[0], AdaPM) == ("AdamW" not in name)
    in_backward = {"recipe", "recipe, refreshed every 10"}
    assert getattr(made[0], "update_in_backward", False) == (name in in_backward)
    if name == "recipe, refreshed every 10":
        assert made[0].param_groups[0]["update_proj_gap"] == 10


@pytest.mark.slow
def test_a_recipe_trains_saves_and_resumes_on_processes(tmp_path):
    """Llama-3-8B's, shrunk."""
    folder = recipe_memory.RECIPES / "trainer/finetune"
    path = tmp_path / "small.yaml"
    changes = {"model_name": None, "adapm": {"lr": 1e-2}}
    path.write_text(yaml.safe_dump({"model": {"init_args": ARGUMENTS | changes}}))
    recipes = [folder / "llama-3-8b-full.yaml", folder / "llama-3-8b-full-fsdp2.yaml", path]
    result = recipe_sharded.measure(recipe_sharded.read(recipes, 2), 2, "cpu")
    assert result["tokens"] == 2 * 4 * 8
    assert result["resumed_losses"] == result["losses"][recipe_sharded.SAVED :]
    assert len(set(result["losses"])) == recipe_sharded.SAVED + recipe_sharded.AFTER  # in float32
