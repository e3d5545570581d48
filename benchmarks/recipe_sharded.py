"""A recipe on several GPUs: it trains, saves and resumes. ``python -m benchmarks.recipe_sharded RECIPE OVERLAY``.

Each process has a GPU of its own. They train from a checkpoint of random weights, which is written first, on one batch
of random tokens again and again: then the losses after resuming must be those of the run that went on.
"""

import argparse
import gc
import importlib
import resource
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader

from benchmarks.costs.processes import over_processes, run_on
from benchmarks.pages.page import RESULTS, provenance, session, table, write
from benchmarks.recipe_training import build
from lightning_adapm import OptimizerStateMonitor, ResidualNormMonitor
from lightning_adapm.litgpt.checkpoint import write_checkpoint
from lightning_adapm.litgpt.module import LitGPTModule
from lightning_adapm.report.tables import read_bytes, show_bytes

SAVED = 8
"""Steps before the checkpoint, with refreshes of bases and two that the monitors measure."""
AFTER = 4
"""Steps after it, which are taken twice: without interruption, and by the run that resumes."""
WATCHED_EVERY = 4


@dataclass
class Seen:
    """What a :class:`Progress` saw: times of ``time.monotonic()`` at the ends of steps, without the time for saving;
    their losses; seconds of saving; the most bytes before it, of the GPU and resident on the host.
    """

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    saving: float = 0.0
    peak: int = 0
    host: int = 0


class Progress(L.Callback):
    """Note times and losses of steps, and write a checkpoint in between.

    The notes are an object of their own, because Lightning gives a callback the methods of the module, which holds it.

    Args:
        began: Time of ``time.monotonic()`` at the beginning.
        file: Path of the checkpoint to write after :data:`SAVED` steps; None for a run that resumes from it.
    """

    def __init__(self, began: float, file: Path | None) -> None:
        self._began = began
        self._file = file
        self._first = SAVED if file is None else 0
        self.seen = Seen()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any) -> None:
        seen = self.seen
        if trainer.global_step == self._first + len(seen.ends):
            return  # gradients are accumulated
        seen.losses.append(float(outputs["loss"]))
        seen.ends.append(time.monotonic() - seen.saving)
        if trainer.is_global_zero:
            seconds = time.monotonic() - self._began
            print(f"step {trainer.global_step} after {seconds:.1f} s, loss {seen.losses[-1]:.4f}", flush=True)
        if self._file is not None and trainer.global_step == SAVED:
            seen.peak, seen.host = peak_bytes(), host_bytes()
            dist.barrier()
            began = time.monotonic()
            trainer.save_checkpoint(self._file)
            dist.barrier()
            seen.saving = time.monotonic() - began


def peak_bytes() -> int:
    """The most that this process's GPU has given out since the last reset; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0


def host_bytes() -> int:
    """The most that was resident of this process on the host, mapped files included."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class SameBatch(L.LightningDataModule):
    """Batches that are all alike."""

    def __init__(self, module: LitGPTModule, batches: int) -> None:
        super().__init__()
        self._rows = module.micro_batch_size
        length = module.max_seq_length or module.model.config.block_size
        generator = torch.Generator().manual_seed(0)
        batch = torch.randint(module.model.config.vocab_size, (self._rows, length + 1), generator=generator)
        self.tokens: Any = batch.repeat(batches, 1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.tokens, batch_size=self._rows)


def merged(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with another on top of it, as the command line merges them."""
    found = dict(first)
    for key, value in then.items():
        inner = found.get(key)
        found[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return found


def read(recipes: list[Path], processes: int) -> dict[str, Any]:
    """The recipe that some files make together, for as many processes."""
    found: dict[str, Any] = {}
    for path in recipes:
        found = merged(found, yaml.safe_load(path.read_text(encoding="utf-8")))
    found["trainer"]["strategy"]["init_args"]["data_parallel_size"] = processes
    return found


def _fit(
    recipe: Mapping[str, Any], device: str, folder: str, progress: Progress, resumed: Path | None = None
) -> tuple[int, Seen]:
    """Train to the end, and return the tokens of a step and what was seen."""
    trainer, arguments = recipe["trainer"], recipe["model"]["init_args"]
    module = LitGPTModule(**arguments)
    module.resumes = resumed is not None
    name, _, kind = trainer["strategy"]["class_path"].rpartition(".")
    together, steps = trainer.get("accumulate_grad_batches", 1), SAVED + AFTER
    data = SameBatch(module, dist.get_world_size() * together * steps)
    L.Trainer(
        max_steps=steps,
        devices=dist.get_world_size(),
        accelerator=device,
        strategy=getattr(importlib.import_module(name), kind)(**trainer["strategy"]["init_args"]),
        precision=trainer.get("precision"),
        accumulate_grad_batches=together,
        gradient_clip_val=trainer.get("gradient_clip_val"),
        callbacks=[OptimizerStateMonitor(WATCHED_EVERY), ResidualNormMonitor(WATCHED_EVERY), progress],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data, ckpt_path=None if resumed is None else str(resumed))
    return data.tokens[:, 1:].numel() // steps, progress.seen


def work(recipe: Mapping[str, Any], device: str, limit: int | None, folder: str, began: float) -> dict[str, Any]:
    """Train, save and resume on this process, together with the others."""
    if device == "cuda" and limit is not None:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    file = Path(folder) / "resumed.ckpt"
    tokens, first = _fit(recipe, device, folder, Progress(began, file))
    over_all, on_host = peak_bytes(), host_bytes()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    again = time.monotonic()
    _, then = _fit(recipe, device, folder, Progress(again, None), file)
    steps = [b - a for a, b in zip(first.ends, first.ends[1:], strict=False)]
    return {
        "tokens": tokens,
        "start_seconds": first.ends[0] - began,
        "step_seconds": median(steps),
        "worst_step_seconds": max(steps),
        "tokens_per_second": tokens / median(steps),
        "saving_seconds": first.saving,
        "resuming_seconds": then.ends[0] - again,
        "peak": over_processes(first.peak),
        "peak_with_saving": over_processes(over_all),
        "peak_with_resuming": over_processes(peak_bytes()),
        "host_bytes": over_processes(first.host),
        "host_bytes_with_saving": over_processes(on_host),
        "losses": first.losses,
        "resumed_losses": then.losses,
    }


def measure(
    recipe: Mapping[str, Any], processes: int, device: str, limit: int | None = None, folder: Path | None = None
) -> dict[str, Any]:
    """Figures of a run on as many processes.

    Args:
        recipe: Content of a recipe, by :func:`read`.
        processes: Number of processes of this machine.
        device: ``"cuda"``, or ``"cpu"``.
        limit: Bytes that each process may use of its GPU; None for all.
        folder: Folder for the weights and the checkpoint, which are deleted in the end; None for a temporary one.
    """
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        module, weights = build(recipe, device), Path(inside) / "weights"
        write_checkpoint(weights, module, module.state_dict())
        del module
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        recipe = merged(recipe, {"model": {"init_args": {"checkpoint_dir": str(weights), "tokenizer_dir": None}}})
        size = (weights / "lit_model.pth").stat().st_size
        print(f"weights of {show_bytes(size)} are written", flush=True)
        found = run_on(processes, device, work, recipe, device, limit, inside, time.monotonic())
        return {"checkpoint_bytes": size, **found}


def page(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    steps, again = len(result["losses"]), len(result["resumed_losses"])
    losses = zip(result["losses"][-again:], result["resumed_losses"], strict=True)
    apart = max(abs(ours - theirs) / abs(ours) for ours, theirs in losses)
    most = {
        "peak": "peak of a GPU in training",
        "peak_with_saving": "with saving and the steps after it",
        "peak_with_resuming": "with resuming",
        "host_bytes": "largest resident memory of a process in training",
        "host_bytes_with_saving": "largest resident memory of a process, with saving",
    }
    rows = [
        ("tokens of a step", f"{result['tokens']:,}"),
        ("tokens per second", f"{result['tokens_per_second']:,.0f}"),
        ("step, median", f"{result['step_seconds']:.2f} s"),
        ("step, worst", f"{result['worst_step_seconds']:.2f} s"),
        ("from the start of the processes to the end of the first step", f"{result['start_seconds']:.1f} s"),
        ("saving a checkpoint", f"{result['saving_seconds']:.1f} s"),
        ("from the module to the end of the first step after resuming", f"{result['resuming_seconds']:.1f} s"),
        *((name, show_bytes(max(result[key]))) for key, name in most.items() if key in result),
        ("losses after resuming differ from those without by at most", f"{100 * apart:.2g} %"),
    ]
    lines = [
        f"# A recipe on {result['processes']} processes: {result['recipe']}",
        "",
        provenance(result),
        "",
        f"Weights are random, in a checkpoint of {show_bytes(result['checkpoint_bytes'])}, which is in the host's cache"
        f" when training starts. {steps} steps, a checkpoint after {steps - again}, from which another run resumes."
        " Peaks are the allocator's; resident memory includes libraries and mapped files.",
        "",
        *table(["", ""], rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_sharded", description=__doc__)
    parser.add_argument("recipes", type=Path, nargs="+", help="files that make a recipe, in order")
    parser.add_argument("--processes", type=int, default=4, help="of this machine, each with a GPU of its own")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--limit", type=read_bytes, help="bytes that each may use of its GPU, such as 24GiB")
    parser.add_argument("--folder", type=Path, help="for the weights and a checkpoint; by default a temporary one")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    stem = args.recipes[-1].stem
    recipe = read(args.recipes, args.processes)
    result = session("recipe_sharded", args.device) | {
        "recipe": stem,
        "processes": args.processes,
        **measure(recipe, args.processes, args.device, args.limit, args.folder),
    }
    file = args.output / f"recipe_sharded-{stem}-{args.processes}.json"
    write(file, result, page(result))
    print(file.with_suffix(".md").read_text(), flush=True)


if __name__ == "__main__":
    main()
