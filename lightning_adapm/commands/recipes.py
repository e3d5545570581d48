"""``lightning-adapm recipes``: a table of the recipes that come with the package, or one recipe's text."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

from lightning_adapm.report.tables import as_text, new_table
from lightning_adapm.trainer.errors import CommandParser
from lightning_adapm.trainer.recipes import PREFIX, find_recipe, recipes

ANY = "any"
"""Model of a recipe that follows any other."""

_FOOTER = f"""\
Run one:       lightning-adapm COMMAND --config {PREFIX}NAME
After another: lightning-adapm fit --config {PREFIX}pretrain/quickstart --config {PREFIX}pretrain/quickstart-adamw
Print one:     lightning-adapm recipes NAME
Data and weights that a recipe needs are in its first lines."""

_DESCRIPTION = """\
List the recipes that come with the package, or print one:

  lightning-adapm recipes
  lightning-adapm recipes finetune/pythia-1b-full > mine.yaml
"""

_COMMAND = re.compile(r"^#   (?:lightning-adapm (?=fit))?((?:fit|litgpt) (?:.*\\\n)*.*)", re.MULTILINE)
"""The command in a recipe's first lines, with the lines that continue it."""

_CONFIG = re.compile(r"--config recipes/(?:trainer/)?(\S+)\.yaml")
_MODE = re.compile(r"-(full|lora|dpo)$")


def run(words: list[str]) -> None:
    """Print the table of all recipes, or the text of the one that the words after ``recipes`` name."""
    parser = CommandParser(
        prog="lightning-adapm recipes",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # type: ignore[arg-type]
    )
    parser.add_argument("name", nargs="?", help="name of the recipe to print; without it, all are listed")
    name = parser.parse_args(words).name
    if name is not None:
        print(find_recipe(name.removeprefix(PREFIX)).read_text(encoding="utf-8"), end="")
        return
    table = new_table()
    for header in ("Name", "Model", "What", "Command"):
        table.add_column(header, no_wrap=header in ("Name", "Model"))
    for name, file in recipes().items():
        table.add_row(name, *_described(file))
    print(as_text(table, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    print(_FOOTER)


def _described(file: Path) -> tuple[str, str, str]:
    """Model, purpose and command of a recipe, from its first lines and its content."""
    text = file.read_text(encoding="utf-8")
    what = text.partition("\n")[0].removeprefix("# ").partition(": ")[0].removesuffix(".")
    found = _COMMAND.search(text)
    if found is None:
        raise ValueError(f"{file}: the first lines of a recipe must have its command")
    command = found[1].partition(" --config")[0]
    base, *overlays = _CONFIG.findall(found[1])
    if not overlays:
        return _model(yaml.safe_load(text), base), what, command
    if base.endswith("/RECIPE"):
        return ANY, what, f"{command}, after {base.removesuffix('RECIPE')}..."
    return _model({}, base), what, f"{command}, after {base}"


def _model(recipe: dict[str, Any], name: str) -> str:
    """Name of the model in a recipe, or of the recipe itself where it describes the model by its sizes."""
    section = recipe.get("model", {}).get("init_args", {})
    return section.get("model_name") or recipe.get("model_name") or _MODE.sub("", name.rpartition("/")[2])
