"""Bytes of optimizer state of every recipe, as ``lightning-adapm plan`` says them.

``python -m benchmarks.recipe_memory`` writes them into the recipes' headers and the table of docs/recipes.md.
``python -m benchmarks.recipe_training`` measures a recipe on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections import defaultdict
from pathlib import Path

import yaml

from lightning_adapm.commands import plan as plan_command

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "recipes"
PAGE = REPOSITORY / "docs" / "recipes.md"
SHOWN = ("AdamW", "AdaPM", "AdaPM factored", "PartialMuon")
_MEMORY = re.compile(r"^# Memory: .*$", re.MULTILINE)
_STEP = re.compile(r"^# Step: .*$", re.MULTILINE)
_TABLE = re.compile(r"(?<=<!-- memory -->\n).*(?=<!-- end of memory -->)", re.DOTALL)


def _printed(recipe: Path, *words: str) -> list[str]:
    """Lines of ``lightning-adapm plan --config recipe``."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        plan_command.run(["--config", str(recipe), *words])
    return out.getvalue().splitlines()


def planned(recipe: Path) -> dict[str, str]:
    """Total bytes of state by method, in the words of ``lightning-adapm plan --config recipe``."""
    lines = _printed(recipe)
    columns = re.split(r"\s{2,}", next(line for line in lines if "AdamW" in line).strip())
    totals = re.split(r"\s{2,}", next(line for line in lines if line.startswith("  total")).strip())[1:]
    return dict(zip(columns, totals, strict=True))


def memory_line(recipe: Path) -> str:
    """The line of a recipe's header that states its memory."""
    totals = planned(recipe)
    return f"# Memory:   optimizer state {', '.join(f'{name} {totals[name]}' for name in SHOWN)}"


def planned_step(recipe: Path) -> str:
    """Planned bytes of a whole training step, and what it is of."""
    lines = _printed(recipe, "--fits", "1TiB")
    about = next(line for line in lines if line.startswith("A training step"))
    total = next(line for line in reversed(lines) if line.startswith("  total"))
    size = re.split(r"\s{2,}", total.strip())[1]
    return f"{size} in all, for {about.partition(': ')[2]}"


def step_line(recipe: Path) -> str:
    """The line of a recipe's header that states the memory of a whole training step."""
    return f"# Step:     planned {planned_step(recipe)}"


def complete_recipes() -> list[Path]:
    """The recipes that describe a model and state its memory, in order; not overlays, nor what starts from a result."""
    return [
        path
        for path in sorted(RECIPES.rglob("*.yaml"))
        if path.relative_to(RECIPES).as_posix() != "litgpt/finetune/quickstart.yaml"
        and {"model", "model_name", "checkpoint_dir"} & yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    ]


def stated(recipe: Path) -> dict[str, str]:
    """Total bytes of state by method, as the recipe's header states them."""
    line = _MEMORY.search(recipe.read_text(encoding="utf-8"))
    assert line is not None, recipe
    return {
        name: f"{number} {unit}"
        for name, number, unit in (
            figure.rsplit(" ", 2) for figure in line.group().partition("optimizer state ")[2].split(", ")
        )
    }


def table() -> str:
    """The table of docs/recipes.md, from the recipes' headers: a row for recipes of one name and state."""
    rows: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in complete_recipes():
        totals, (command, *name) = stated(path), path.relative_to(RECIPES).with_suffix("").parts
        row = "/".join(name), *(totals[method] for method in SHOWN)
        rows[row].append(f"[{command}](../{path.relative_to(REPOSITORY)})")
    lines = [f"| recipe | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
    lines += [f"| {name}: {', '.join(links)} | {' | '.join(state)} |" for (name, *state), links in sorted(rows.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Refresh every figure."""
    argparse.ArgumentParser(prog="python -m benchmarks.recipe_memory", description=__doc__).parse_args()
    for path in complete_recipes():
        text = path.read_text(encoding="utf-8")
        text = _MEMORY.sub(memory_line(path), text, count=1)
        if _STEP.search(text):
            text = _STEP.sub(step_line(path), text, count=1)
        path.write_text(text, encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_TABLE.sub(lambda _: table(), page), encoding="utf-8")


if __name__ == "__main__":
    main()
