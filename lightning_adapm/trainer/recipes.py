"""Recipes by name: ``--config recipe:finetune/pythia-1b-full`` finds the file in the package or in a clone."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

PREFIX = "recipe:"
"""Start of a value of ``--config`` that names a recipe and not a file."""

LITGPT = "litgpt/"
"""Start of the names of recipes for litgpt's own commands; all others are for the Trainer."""

_TRAINER = "trainer/"
_OPTIONS = ("--config", "-c")


def recipes() -> dict[str, Path]:
    """Files of all recipes by name, such as ``finetune/pythia-1b-full`` and ``litgpt/finetune/pythia-1b-full``.

    Raises:
        FileNotFoundError: The package is installed without its recipes.
    """
    package = Path(__file__).parents[1]
    folders = (package / "recipes", package.parent / "recipes")  # installed from a wheel, and a clone
    folder = next((each for each in folders if each.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"there are no recipes in {package}; install the wheel or a clone, or name a file")
    names = {
        file.relative_to(folder).as_posix().removesuffix(".yaml").removeprefix(_TRAINER): file
        for file in folder.rglob("*.yaml")
    }
    return {name: names[name] for name in sorted(names, key=lambda name: (name.startswith(LITGPT), name))}


def find_recipe(name: str) -> Path:
    """File of the recipe ``name``, which may begin with ``trainer/`` and end with ``.yaml``, as in the repository.

    Raises:
        ValueError: There is no such recipe.
    """
    known = recipes()
    short = name.removesuffix(".yaml").removeprefix(_TRAINER)
    if short in known:
        return known[short]
    near = [each for each in known if short and short.lower() in each.lower()]
    near += [each for each in difflib.get_close_matches(short, known, cutoff=0.5) if each not in near]
    hint = f"the nearest are {', '.join(near[:4])}; " if near else ""
    raise ValueError(f"{PREFIX}{name}: there is no such recipe; {hint}`lightning-adapm recipes` lists all")


def with_files(words: Sequence[str], kind: Literal["trainer", "litgpt"] | None = None) -> list[str]:
    """Replace recipes after ``--config`` by the paths of their files, and look into those of the caller's own.

    Args:
        words: Words of a command line.
        kind: Kind of recipe that the command accepts; ``None`` for both.

    Raises:
        ValueError: There is no such recipe, it is of the other kind, or a file is no text in UTF-8.
    """
    replaced = list(words)
    for index, word in enumerate(words):
        option, _, value = word.partition("=")
        if option not in _OPTIONS:
            continue
        place, before = (index, f"{option}=") if value else (index + 1, "")
        value = value or "".join(words[place : place + 1])
        if value.startswith(PREFIX):
            replaced[place] = f"{before}{_file(value, kind)}"
        else:
            _check_encoding(value)
    return replaced


def _check_encoding(file: str) -> None:
    """Refuse a file in another encoding than UTF-8. The parser, which fails at it, names what is no file."""
    try:
        with suppress(OSError):
            Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"--config: {file} is not text in UTF-8; save it in that encoding, in PowerShell with"
            " `lightning-adapm recipes NAME | Out-File -Encoding utf8 FILE`"
        ) from None


def _file(value: str, kind: Literal["trainer", "litgpt"] | None) -> Path:
    """File of a value ``recipe:NAME``, if the recipe is of this kind."""
    file = find_recipe(value.removeprefix(PREFIX))
    name = next(each for each, path in recipes().items() if path == file)
    if kind is None or name.startswith(LITGPT) == (kind == "litgpt"):
        return file
    twin = name.removeprefix(LITGPT) if kind == "trainer" else LITGPT + name
    instead = f"write {PREFIX}{twin}" if twin in recipes() else "`lightning-adapm recipes` lists the others"
    owner = "litgpt's own commands" if name.startswith(LITGPT) else "`lightning-adapm fit`"
    raise ValueError(f"{value}: this recipe is for {owner}; {instead}")
