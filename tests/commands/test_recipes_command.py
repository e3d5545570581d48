"""Recipes by name: the table that lists them, and ``--config recipe:NAME`` of every command."""

import os
import shutil
from pathlib import Path

import pytest
from commands import RECIPES

import lightning_adapm
from lightning_adapm.__main__ import main
from lightning_adapm.trainer import recipes as recipes_module
from lightning_adapm.trainer.recipes import find_recipe, recipes, with_files

NAME = "finetune/pythia-1b-full"


def printed(capsys, *words):
    main(["recipes", *words])
    return capsys.readouterr().out


def refused(capsys, *words):
    with pytest.raises(SystemExit) as error:
        main([*words])
    return str(error.value)


def test_every_recipe_of_the_repository_has_one_row(capsys):
    assert set(recipes().values()) == set(RECIPES.rglob("*.yaml"))
    lines = [line.split("  ") for line in printed(capsys).splitlines()]
    rows = {row[0]: row for row in ([cell.strip() for cell in line if cell.strip()] for line in lines) if row}
    assert recipes().keys() <= rows.keys()
    assert all(len(rows[name]) == 4 for name in recipes())


@pytest.mark.parametrize(
    ("name", "model", "command"),
    [
        (NAME, "pythia-1b", "fit"),
        ("litgpt/finetune/llama-3-8b-lora", "llama-3-8b", "litgpt finetune_lora"),
        ("pretrain/quickstart-muon", "quickstart", "fit, after pretrain/quickstart"),
        ("finetune/llama-3-8b-full-fsdp2", "llama-3-8b", "fit, after finetune/llama-3-8b-full"),
        ("preference/adamw", "any", "fit, after preference/..."),
    ],
)
def test_a_row_has_model_and_command(capsys, name, model, command):
    (row,) = [line for line in printed(capsys).splitlines() if line.split()[:1] == [name]]
    assert row.split()[1] == model
    assert row.endswith(f"  {command}")


def test_one_recipe_is_printed_as_it_is(capsys):
    assert printed(capsys, NAME) == (RECIPES / "trainer" / f"{NAME}.yaml").read_text()
    assert printed(capsys, f"recipe:trainer/{NAME}.yaml") == printed(capsys, NAME)


@pytest.mark.parametrize("command", [["fit"], ["plan"], ["litgpt", "finetune_full"]])
@pytest.mark.parametrize("form", [["--config", "recipe:pythia-1b"], ["--config=recipe:pythia-1b"]])
def test_an_unknown_name_is_one_line_with_the_nearest(capsys, monkeypatch, command, form):
    monkeypatch.setattr("sys.argv", ["lightning-adapm", *command, *form])
    message = refused(capsys, *command, *form)
    assert "recipe:pythia-1b: there is no such recipe; the nearest are finetune/pythia-1b-full, litgpt/" in message
    assert "`lightning-adapm recipes` lists all" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["", "../pyproject", "/etc/passwd", "Finetune/", "finetune"])
def test_only_names_are_found(name):
    with pytest.raises(ValueError, match=f"^recipe:{name}: there is no such recipe"):
        find_recipe(name)


def test_a_recipe_of_the_other_kind_names_its_twin(capsys):
    message = refused(capsys, "litgpt", "finetune_full", "--config", f"recipe:{NAME}")
    assert f"recipe:{NAME}: this recipe is for `lightning-adapm fit`; write recipe:litgpt/{NAME}" in message
    with pytest.raises(ValueError, match=rf"is for litgpt's own commands; write recipe:{NAME}$"):
        with_files(["fit", "-c", f"recipe:litgpt/{NAME}"], "trainer")
    with pytest.raises(ValueError, match=r"`lightning-adapm recipes` lists the others$"):
        with_files(["--config", "recipe:finetune/adamw"], "litgpt")


def test_other_words_stay_as_they_are():
    words = ["fit", "--config", "mine.yaml", "recipe:x", "--model.name=recipe:x", "--config"]
    assert with_files(words) == words


def test_plan_is_that_of_the_file(capsys):
    totals = []
    for config in (f"recipe:litgpt/{NAME}", RECIPES / "litgpt" / f"{NAME}.yaml"):
        with pytest.raises(SystemExit):
            main(["plan", "--config", str(config)])
        totals.append(capsys.readouterr().out)
    assert totals[0] == totals[1] and "AdamW" in totals[0]


def test_the_package_is_asked_before_the_clone(tmp_path, monkeypatch):
    package = tmp_path / "lightning_adapm"
    shutil.copytree(Path(lightning_adapm.__file__).parent / "trainer", package / "trainer")
    monkeypatch.setattr(recipes_module, "__file__", str(package / "trainer" / "recipes.py"))
    with pytest.raises(FileNotFoundError, match="there are no recipes in"):
        recipes()
    shutil.copytree(RECIPES, package / "recipes")
    assert find_recipe(NAME) == package / "recipes" / "trainer" / f"{NAME}.yaml"


def test_whoever_reads_may_stop(monkeypatch, capsys):
    """As ``| head`` does."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as closed:
        monkeypatch.setattr("sys.stdout", closed)
        with pytest.raises(SystemExit) as ended:
            main(["recipes"])
    assert ended.value.code == 1 and not capsys.readouterr().err
