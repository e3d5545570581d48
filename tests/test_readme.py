"""What the README shows is what works: its snippets run as written."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from models import PlainLM, PlainTraining, token_batches
from test_callbacks import CLI_PROJECT, run_script

from lightning_adapm import AdaPM

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.S) for kind in ("python", "yaml")}


def test_the_three_ways_are_short():
    assert len(SNIPPETS["python"]) == 2 and len(SNIPPETS["yaml"]) == 1
    for snippet in (*SNIPPETS["python"], *SNIPPETS["yaml"]):
        assert len([line for line in snippet.splitlines() if line.strip()]) <= 6


def test_the_mixin(tmp_path):
    names = {}
    exec(SNIPPETS["python"][0], names)

    class Project(PlainTraining, names["MyModule"]):
        pass

    options = {"max_steps": 5, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **options)
    trainer.fit(Project())
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, AdaPM)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * 6 / 101)  # in the warm-up of 100 steps


def test_the_optimizer():
    names = {"model": PlainLM()}
    exec(SNIPPETS["python"][1], names)
    names["model"](token_batches(1)[0]).backward()
    before = names["model"].lm_head.weight.detach().clone()
    names["optimizer"].step()
    assert not torch.equal(names["model"].lm_head.weight, before)


def test_the_yaml(tmp_path):
    config = yaml.safe_load(SNIPPETS["yaml"][0])
    config["trainer"] |= {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    show = "\nfrom lightning.pytorch.cli import LightningCLI\n"
    source = CLI_PROJECT.replace("LightningCLI(", "cli = LightningCLI(") + "\nprint(type(cli.trainer.optimizers[0]))"
    done = run_script(tmp_path, show + source, "fit", "--config", "config.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lightning_adapm.optim.adapm.AdaPM" in done.stdout
