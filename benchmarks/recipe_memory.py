"""Bytes of optimizer state of every recipe, as ``lightning-adapm plan`` says them.

``python -m benchmarks.recipe_memory`` writes them into the recipes' headers and the table of docs/recipes.md.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import yaml

from lightning_adapm.commands import plan as plan_command

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "recipes"
PAGE = REPOSITORY / "docs" / "recipes.md"
SHOWN = ("AdamW", "AdaPM", "AdaPM block", "PartialMuon")
_MEMORY = re.compile(r"^# Memory: .*$", re.MULTILINE)
_TABLE = re.compile(r"(?<=<!-- memory -->\n).*(?=<!-- end of memory -->)", re.DOTALL)


def planned(recipe: Path) -> dict[str, str]:
    """Total bytes of state by method, in the words of ``lightning-adapm plan --config recipe``."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        plan_command.run(["--config", str(recipe)])
    lines = out.getvalue().splitlines()
    columns = re.split(r"\s{2,}", next(line for line in lines if "AdamW" in line).strip())
    totals = re.split(r"\s{2,}", next(line for line in lines if line.startswith("  total")).strip())[1:]
    return dict(zip(columns, totals, strict=True))


def memory_line(recipe: Path) -> str:
    """The line of a recipe's header that states its memory."""
    totals = planned(recipe)
    return f"# Memory:   optimizer state {', '.join(f'{name} {totals[name]}' for name in SHOWN)}"


def complete_recipes() -> list[Path]:
    """The recipes that describe a model and state its memory, in order; not overlays, nor what starts from a result."""
    return [
        path
        for path in sorted(RECIPES.rglob("*.yaml"))
        if path.relative_to(RECIPES).as_posix() != "litgpt/finetune/quickstart.yaml"
        and {"model", "model_name", "checkpoint_dir"} & yaml.safe_load(path.read_text(encoding="utf-8")).keys()
    ]


def table() -> str:
    """The table of docs/recipes.md."""
    lines = [f"| recipe | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
    for path in complete_recipes():
        totals = planned(path)
        name, link = path.relative_to(RECIPES).with_suffix(""), path.relative_to(REPOSITORY)
        lines.append(f"| [{name}](../{link}) | {' | '.join(totals[method] for method in SHOWN)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Refresh every figure."""
    for path in complete_recipes():
        text = path.read_text(encoding="utf-8")
        path.write_text(_MEMORY.sub(memory_line(path), text, count=1), encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_TABLE.sub(lambda _: table(), page), encoding="utf-8")


if __name__ == "__main__":
    main()
