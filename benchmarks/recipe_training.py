"""Training of a recipe on a GPU: memory next to the plan, speed next to AdamW, and the time until it starts.

``python -m benchmarks.recipe_training RECIPE --limit 24GiB`` trains within that much memory of a GPU, on random tokens
and from random weights. With ``--start DIR`` it also writes a checkpoint there, and times ``lightning-adapm fit`` with
it, from the command to the end of the first step.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from benchmarks.pages.page import RESULTS, provenance, session, table, write
from benchmarks.recipe_memory import planned_step
from lightning_adapm import OptimizerStateMonitor, ResidualNormMonitor
from lightning_adapm.litgpt.checkpoint import write_checkpoint
from lightning_adapm.litgpt.module import LitGPTModule, batch_length, batch_rows
from lightning_adapm.report.tables import read_bytes, show_bytes

WATCHED = 11
"""Steps with monitors in the first and the last of them, which seed and refresh bases, too."""
TIMED = 20
"""Steps after these, whose time counts: one interval of refreshes every 20 steps, or two of every 10."""
_STAGE = re.compile(r"^started: (.+) after ([\d.]+) s$", re.MULTILINE)
_STAGES = ("classes are built", "weights are there", "first step begins", "first step ended")


class RandomTokens(L.LightningDataModule):
    """Batches of random tokens, for ``lightning-adapm fit``.

    Args:
        rows: Sequences of a batch.
        length: Positions per sequence.
        vocab_size: Number of different tokens.
        batches: Number of batches.
    """

    def __init__(self, rows: int = 2, length: int = 2048, vocab_size: int = 32000, batches: int = 4) -> None:
        super().__init__()
        self.rows = rows
        self.tokens: Any = torch.randint(vocab_size, (rows * batches, length + 1))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.tokens, batch_size=self.rows)


class FirstStep(L.Callback):
    """Print the time since this process was started at every stage until the first step ends."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._reached(_STAGES[0])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._reached(_STAGES[1])

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._reached(_STAGES[2])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        _wait(pl_module.device)
        self._reached(_STAGES[3])

    def _reached(self, stage: str) -> None:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        seconds = float(Path("/proc/uptime").read_text().split()[0]) - started
        print(f"started: {stage} after {seconds:.1f} s", flush=True)


@dataclass
class Seen:
    """What a :class:`Watch` saw: seconds of every batch, the allocator's peak in it, and the tokens of one batch."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    tokens: int = 0


class Watch(L.Callback):
    """Note what every batch costs. Ends the work of other callbacks after some steps.

    The notes are an object of their own, because Lightning gives a callback the methods of the module, which holds it.
    """

    def __init__(self) -> None:
        self.seen = Seen()
        self._began = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *_: Any) -> None:
        self.seen.tokens = batch_rows(batch) * batch_length(batch)
        _wait(pl_module.device)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        _wait(pl_module.device)
        self.seen.seconds.append(time.perf_counter() - self._began)
        self.seen.peaks.append(torch.cuda.max_memory_allocated() if pl_module.device.type == "cuda" else 0)
        if trainer.global_step == WATCHED:
            trainer.callbacks[:] = [self]  # type: ignore[attr-defined]


class Staying(SingleDeviceStrategy):
    """Strategy that leaves the model where it is in the end: tens of gigabytes take long to the host."""

    def teardown(self) -> None:
        pass


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _as_recipe(module: LitGPTModule, **changes: Any) -> Optimizer:
    return module.adapm_class(module.named_parameters(), **module.adapm_options | changes)


def _adamw(module: LitGPTModule) -> Optimizer:
    return AdamW(module.parameters(), lr=module.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


OPTIMIZERS: dict[str, Callable[[LitGPTModule], Optimizer]] = {
    "recipe": _as_recipe,
    "recipe, refreshed every 10": partial(_as_recipe, update_proj_gap=10),
    "recipe, updates after backward": partial(_as_recipe, update_in_backward=False),
    "AdamW, fused": _adamw,
}
"""Rows of a result. The limit holds for the first alone."""


def build(recipe: Mapping[str, Any], device: str) -> LitGPTModule:
    """The recipe's module with random weights, drawn on the device in the dtype of training."""
    bfloat16 = recipe["trainer"].get("precision") == "bf16-true"
    torch.set_default_dtype(torch.bfloat16 if bfloat16 else torch.float32)
    try:
        with torch.device(device):
            return LitGPTModule(**recipe["model"]["init_args"] | {"checkpoint_dir": None})
    finally:
        torch.set_default_dtype(torch.float32)


def train(recipe: Mapping[str, Any], make: Callable[[LitGPTModule], Optimizer], device: str, steps: int) -> Seen:
    """Train a recipe on random tokens with an optimizer, and watch every batch."""
    module, trainer, watch = build(recipe, device), recipe["trainer"], Watch()
    optimizer = make(module)
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    together = trainer.get("accumulate_grad_batches", 1)
    rows, length = module.micro_batch_size, module.max_seq_length or module.model.config.block_size
    tokens = RandomTokens(rows, length, module.model.config.vocab_size, steps * together)
    with tempfile.TemporaryDirectory() as folder:  # for the figures of monitors
        L.Trainer(
            max_steps=steps,
            accelerator=device,
            strategy=Staying(torch.device(device, 0) if device == "cuda" else device),
            devices=1,
            default_root_dir=folder,
            precision=trainer.get("precision"),
            accumulate_grad_batches=together,
            callbacks=[OptimizerStateMonitor(WATCHED - 1), ResidualNormMonitor(WATCHED - 1), watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(module, tokens)
    return watch.seen


def measure(
    path: Path, name: str = "recipe", limit: int | None = None, device: str = "cuda", timed: int = 0
) -> dict[str, Any]:
    """Peak bytes and seconds of one row of :data:`OPTIMIZERS`.

    The first steps include the seeding of bases, refreshes and steps that monitors measure, all of them at once.

    Args:
        path: Recipe of a ``LitGPTModule`` for the Trainer.
        name: Optimizer.
        limit: Bytes that training may use; None for all.
        device: ``"cuda"``, or ``"cpu"`` to try the command.
        timed: Number of steps whose time counts.
    """
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    if device == "cuda":
        share = 1.0 if limit is None else limit / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(share)
    try:
        seen = train(recipe, OPTIMIZERS[name], device, WATCHED + timed)
    except torch.OutOfMemoryError as error:
        return {"skipped": str(error).splitlines()[0]}
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    row: dict[str, Any] = {"peak": max(seen.peaks), "peaks": seen.peaks, "seconds": seen.seconds}
    if timed:
        together = recipe["trainer"].get("accumulate_grad_batches", 1)
        row["tokens_per_second"] = seen.tokens / fmean(seen.seconds[-timed * together :])
    return row


def write_weights(module: LitGPTModule, folder: Path) -> int:
    """Write a checkpoint directory, leave it out of the host's caches, and return its bytes."""
    write_checkpoint(folder, module, module.state_dict())
    file = folder / "lit_model.pth"
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file.stat().st_size


def time_start(path: Path, folder: Path, device: str) -> dict[str, Any]:
    """Seconds from ``lightning-adapm fit`` to the end of the first step: with weights on the disk, and in its cache."""
    module = build(yaml.safe_load(path.read_text(encoding="utf-8")), device)
    length = module.max_seq_length or module.model.config.block_size
    data = {"rows": module.micro_batch_size, "length": length, "vocab_size": module.model.config.vocab_size}
    began = time.perf_counter()
    found: dict[str, Any] = {"checkpoint_bytes": write_weights(module, folder)}
    found["writing_seconds"] = time.perf_counter() - began
    print(f"written: {found['writing_seconds']:.1f} s", flush=True)
    del module
    overlay = {
        "trainer": {
            "max_steps": 1,
            "accelerator": device,
            "default_root_dir": str(folder),
            "logger": False,
            "enable_checkpointing": False,
            "callbacks": [{"class_path": f"{__spec__.name}.{FirstStep.__name__}"}],
        },
        "data": {"class_path": f"{__spec__.name}.{RandomTokens.__name__}", "init_args": data},
    }
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    words = ["fit", "--config", str(path), "--config", str(folder / "overlay.yaml")]
    words.append(f"--model.init_args.checkpoint_dir={folder}")
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    for name in ("on_disk", "in_cache"):
        run = subprocess.run(
            [sys.executable, "-m", "lightning_adapm", *words], capture_output=True, text=True, check=False
        )
        stages = {stage: float(seconds) for stage, seconds in _STAGE.findall(run.stdout)}
        found[f"{name}_stages"] = stages
        found[name] = stages.get(_STAGES[3], f"failed: {run.stderr[-500:]}")
        print(f"{name}: {found[name]}; {stages}", flush=True)
    return found


def page(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [f"# Training of a recipe: {result['model']}", "", provenance(result), ""]
    if result["rows"]:
        lines += _rows(result)
    if start := result["start"]:
        lines += [
            "",
            "`lightning-adapm fit`, from the command to the end of the first step, with a checkpoint of"
            f" {show_bytes(start['checkpoint_bytes'])}: {start.get('on_disk')} s from the disk, {start.get('in_cache')}"
            " s from the host's cache.",
        ]
    return "\n".join(lines) + "\n"


def _rows(result: Mapping[str, Any]) -> list[str]:
    lines = [
        f"Planned: {result['planned']}. Peaks are the allocator's over {WATCHED} steps, which seed bases, refresh them"
        f" and measure for the monitors. Tokens per second are those of the {TIMED} steps after these.",
        "",
    ]
    rows = []
    base = result["rows"].get("AdamW, fused", {}).get("tokens_per_second")
    for name, row in result["rows"].items():
        if "skipped" in row:
            rows.append([name, row["limit"], f"skipped: {row['skipped']}", "", "", ""])
            continue
        speed = row["tokens_per_second"]
        first = f"{row['seconds'][0]:.2f} s"
        ratio = f"{speed / base:.3f}" if base else ""
        rows.append([name, row["limit"], show_bytes(row["peak"]), first, f"{speed:,.0f}", ratio])
    lines += table(["", "limit", "peak", "first step", "tokens per second", "/ AdamW, fused"], rows)
    apart = {name: row["measured"] for name, row in result["rows"].items() if "measured" in row}
    return lines + [line for name, words in apart.items() for line in ("", f"{name} was measured {words}.")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_training", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--limit", type=read_bytes, help="bytes that the recipe may use, such as 24GiB")
    parser.add_argument("--rows", nargs="*", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument(
        "--start", type=Path, metavar="DIR", help="write a checkpoint there, and time the start with it"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    file = args.output / f"recipe_training-{args.recipe.stem}.json"
    recipe = yaml.safe_load(args.recipe.read_text(encoding="utf-8"))
    result = session("recipe_training", args.device) | {
        "device": args.device,
        "model": args.recipe.stem,
        "dtype": recipe["trainer"].get("precision", "32-true"),
        "planned": planned_step(args.recipe) if args.rows else "",
        "rows": {},
        "start": None,
    }
    for name in args.rows:
        limit = args.limit if name == "recipe" else None
        row = measure(args.recipe, name, limit, args.device, TIMED)
        result["rows"][name] = row | {"limit": show_bytes(limit) if limit else ""}
        write(file, result, page(result))
        print(file.with_suffix(".md").read_text(), flush=True)
    if args.start is not None:
        result["start"] = time_start(args.recipe, args.start, args.device)
        write(file, result, page(result))
        print(file.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
