"""Bytes of optimizer state of every recipe, as ``lightning-adapm plan`` says them.

``python -m benchmarks.recipe_memory`` writes them into the recipes' headers and the table of docs/recipes.md.
``python -m benchmarks.recipe_memory --measure RECIPE --limit 24GiB`` trains a recipe within that much memory of a GPU,
on random tokens and from random weights, and compares the allocator's peak with the plan.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_adapm import OptimizerStateMonitor, ResidualNormMonitor
from lightning_adapm.commands import plan as plan_command
from lightning_adapm.litgpt.module import LitGPTModule
from lightning_adapm.report.tables import read_bytes, show_bytes

REPOSITORY = Path(__file__).parents[1]
RECIPES = REPOSITORY / "recipes"
PAGE = REPOSITORY / "docs" / "recipes.md"
SHOWN = ("AdamW", "AdaPM", "AdaPM block", "PartialMuon")
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


def step_line(recipe: Path) -> str:
    """The line of a recipe's header that states the memory of a whole training step."""
    lines = _printed(recipe, "--fits", "1TiB")
    about = next(line for line in lines if line.startswith("A training step"))
    total = next(line for line in reversed(lines) if line.startswith("  total"))
    size = re.split(r"\s{2,}", total.strip())[1]
    return f"# Step:     planned {size} in all, for {about.partition(': ')[2]}"


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
    """The table of docs/recipes.md, from the recipes' headers."""
    lines = [f"| recipe | {' | '.join(SHOWN)} |", "|---" * (len(SHOWN) + 1) + "|"]
    for path in complete_recipes():
        totals = stated(path)
        name, link = path.relative_to(RECIPES).with_suffix(""), path.relative_to(REPOSITORY)
        lines.append(f"| [{name}](../{link}) | {' | '.join(totals[method] for method in SHOWN)} |")
    return "\n".join(lines) + "\n"


def measure(recipe: Path, limit: int | None, steps: int = 12) -> int:
    """Most bytes that the allocator of a GPU gives out while a recipe trains on random tokens, from random weights.

    The steps include the first one, a refresh of bases and a step that the monitors measure.

    Args:
        recipe: Recipe of a ``LitGPTModule`` for the Trainer.
        limit: Bytes that training may use; None for all.
        steps: Number of steps.
    """
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    trainer, arguments = content["trainer"], content["model"]["init_args"]
    if limit is not None:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    dtype = torch.bfloat16 if trainer.get("precision") == "bf16-true" else torch.float32
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        module = LitGPTModule(**arguments | {"checkpoint_dir": None})
    torch.set_default_dtype(torch.float32)
    rows, length = module.micro_batch_size, module.max_seq_length or module.model.config.block_size
    tokens: Any = torch.randint(module.model.config.vocab_size, (rows * steps, length + 1))
    torch.cuda.reset_peak_memory_stats()
    L.Trainer(
        max_steps=steps,
        devices=1,
        accelerator="cuda",
        precision=trainer.get("precision"),
        accumulate_grad_batches=trainer.get("accumulate_grad_batches", 1),
        callbacks=[OptimizerStateMonitor(steps // 2), ResidualNormMonitor(steps // 2)],
        logger=False,
        enable_checkpointing=False,
    ).fit(module, DataLoader(tokens, batch_size=rows))
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Refresh every figure, or measure one recipe."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_memory", description=__doc__)
    parser.add_argument("--measure", type=Path, help="recipe to train on this machine's GPU")
    parser.add_argument("--limit", type=read_bytes, help="bytes that it may use, such as 24GiB")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(step_line(arguments.measure).removeprefix("# "))
        print(f"Measured: {show_bytes(measure(arguments.measure, arguments.limit))}")
        return
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
