"""What the README shows is what works: its snippets run as written."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from foreign import CLI_PROJECT, run_script
from models import PlainLM, PlainTraining, token_batches

from lightning_adapm import AdaPM
from lightning_adapm.__main__ import main

DOCS = Path(__file__).parents[1] / "docs"
README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = {kind: re.findall(rf"```{kind}\n(.*?)```", README, re.S) for kind in ("python", "yaml")}


def test_the_three_ways_are_short():
    assert len(README.splitlines()) < 120
    assert len(SNIPPETS["python"]) == 2 and len(SNIPPETS["yaml"]) == 1
    for snippet in (*SNIPPETS["python"], *SNIPPETS["yaml"]):
        assert len([line for line in snippet.splitlines() if line.strip()]) <= 6


def test_the_bytes_of_a_choice_are_those_of_the_tables():
    """Weights, gradients and state in the first table, the budgets of the page, and the state of the plan."""
    choice = README.partition("## Which optimizer when")[2].partition("![")[0]
    sizes = re.findall(r"^\| ([\d.]+) GiB", choice, re.M)
    budget = (DOCS / "choosing-an-optimizer.md").read_text().partition("<!-- budget -->")[2]
    assert sizes[:3] == re.findall(r"([\d.]+) GiB \| `", budget)[:3]
    state = [float(size) for size in re.search(r"^  total (.*)", README, re.M)[1].split()[::2]]
    assert float(sizes[3]) == pytest.approx(float(sizes[0]) - state[0] + state[4], abs=0.11)


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


def shown(text, start):
    """The first block of code whose first line is ``start``."""
    (block,) = [block for block in re.findall(r"```\w*\n(.*?)```", text, re.S) if block.strip().startswith(start)]
    return [line for line in block.splitlines() if line.strip()]


def test_the_plan_that_is_shown_is_what_is_printed(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--model_name", "Llama-3-8B", "--dtype", "bfloat16"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    short = shown(README, "Llama-3-8B: ")
    assert short == printed[: len(short)]
    by_role = shown((DOCS / "choosing-a-policy.md").read_text(), "AdaPM: optimizer state")
    assert by_role == printed[-len(by_role) :] and len(short) + len(by_role) >= len(printed) - 1


def test_the_table_of_roles_that_is_shown_is_what_is_printed(capsys):
    page = (DOCS / "choosing-a-policy.md").read_text()
    exec("\n".join(shown(page, "import torch")), {})
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert shown(page, "Parameter") == printed
