"""Every recipe for the Lightning CLI runs, shrunk, exactly as its file says otherwise."""

import lightning as L
import pytest
import torch
import yaml
from commands import RECIPES, logged, run, shrunk
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser
from torch.optim import Optimizer

from benchmarks import recipe_memory
from lightning_adapm import AdaPMConfig
from lightning_adapm.litgpt.model import litgpt_config

FILES = sorted((RECIPES / "trainer").rglob("*.yaml"))
STATING_MEMORY = recipe_memory.complete_recipes()
COMPLETE = [path for path in STATING_MEMORY if path in FILES]
FOR_ANY = {"adamw": "torch.optim.AdamW", "partial-muon": "lightning_adapm.PartialMuon"}
OVERLAYS = [path for path in FILES if path.stem in FOR_ANY or path.stem.endswith("-fsdp2")]


def configs(path):
    """The files to give: a recipe without a model is a change to the one whose name its own begins with, or to any."""
    if "model" in yaml.safe_load(path.read_text()):
        return [path]
    if path.stem in FOR_ANY:
        return [next(other for other in COMPLETE if other.parent == path.parent), path]
    (base,) = [other for other in FILES if path.stem.startswith(f"{other.stem}-") and other.parent == path.parent]
    return [*configs(base), path]


class StrictLoader(yaml.SafeLoader):
    """YAML keeps the last of two equal keys and says nothing; in a recipe that is a mistake."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"twice the same key{node.start_mark}"
        return super().construct_mapping(node, deep)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_no_key_is_given_twice(path):
    yaml.load(path.read_text(), StrictLoader)


def test_there_are_recipes():
    assert {"quickstart", "quickstart-adamw"} <= {path.stem for path in FILES}


RUN_BY_THE_COMMAND_LINE = ("quickstart", "quickstart-adamw", "quickstart-ddp")
"""Recipes that tests/trainer/test_cli.py runs, with the same assertion on their losses or a stronger one."""
QUICKSTARTS = [
    path for path in FILES if path.stem.startswith("quickstart") and path.stem not in RUN_BY_THE_COMMAND_LINE
]


@pytest.mark.parametrize("path", QUICKSTARTS, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe_runs(path, corpus, tmp_path):
    words = [word for config in configs(path) for word in ("--config", config)]
    if path.stem.endswith("-fsdp2"):  # as Llama's recipe, which is too large for a test
        words += ["--model.init_args.lm_head_chunk_size=6", "--model.init_args.activation_checkpointing=true"]
        words += ["--trainer.strategy.init_args.save_distributed_checkpoint=true"]
        words += ["--trainer.callbacks+=lightning_adapm.LitGPTCheckpoint", "--trainer.callbacks.out_dir=final"]
    run(tmp_path, "fit", *words, *shrunk(corpus, tmp_path))
    (table,) = tmp_path.rglob("metrics.csv")
    losses = [float(value) for value in logged(table.parent, "val_loss")]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    if path.stem.endswith("-fsdp2"):
        saved = torch.load(tmp_path / "final" / "lit_model.pth", weights_only=True)
        assert len(saved["lm_head.weight"]) == 512  # rows of both processes


@pytest.mark.parametrize("path", STATING_MEMORY, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe_states_the_planned_memory(path):
    """After a change of the defaults: python -m benchmarks.recipe_memory."""
    assert recipe_memory.memory_line(path) in path.read_text().splitlines()
    assert all(f"# {word}:" in path.read_text() for word in ("Data", "Tokens", "Hardware"))


STATING_STEPS = [path for path in COMPLETE if "# Step:" in path.read_text()]


@pytest.mark.parametrize("path", STATING_STEPS, ids=lambda path: path.stem)
def test_recipe_for_a_card_fits_it_with_a_margin(path):
    """After a change: python -m benchmarks.recipe_memory. The margin is for CUDA's context and fragmentation."""
    line = recipe_memory.step_line(path)
    assert line in path.read_text().splitlines()
    card, planned = float(path.stem.rpartition("-")[2].removesuffix("gb")), float(line.split()[3])
    assert "GiB in all" in line and planned <= 0.95 * card


def test_page_has_the_recipes_memory():
    assert recipe_memory.table() in recipe_memory.PAGE.read_text()


@pytest.mark.parametrize("path", [*COMPLETE, *OVERLAYS], ids=str)
def test_recipe_fits_the_signatures(path):
    """Every option exists and has the right type, down to the fields of the model and the optimizer's settings."""
    words = [f"--config={config}" for config in configs(path)]
    parsed = parse_fit(words)
    arguments = parsed.model.init_args
    AdaPMConfig.resolve(arguments.adapm)
    litgpt_config(arguments.model_name, arguments.config)
    if path.stem in FOR_ANY:
        assert parsed.optimizer.class_path == FOR_ANY[path.stem]


def parse_fit(words):
    parser = LightningArgumentParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(L.Trainer, "trainer")
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    parser.add_optimizer_args((Optimizer,))
    parser.add_argument("--seed_everything", type=int)
    return parser.parse_args(words)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RECIPES).as_posix())
def test_recipe_says_how_to_run_it(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "lightning-adapm fit" in header
    for config in [path] if path.stem in FOR_ANY else configs(path):
        assert config.relative_to(RECIPES.parent).as_posix() in header
