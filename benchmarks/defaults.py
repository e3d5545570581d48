"""Which refresh interval and which clamp AdaPM should default to: validation loss of a small model, AdamW beside it.

    python benchmarks/defaults.py --output benchmarks/defaults

A litgpt GPT of 0.9 million parameters reads the bytes of Python's standard library. Every run of a seed starts from the
same weights and sees the same batches. Writes ``OUTPUT.json`` and ``OUTPUT.md``.
"""

import argparse
import datetime
import json
import math
import os
import platform
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from torch import Tensor
from torch.optim import Optimizer

from lightning_adapm import AdaPM

STEPS, WARMUP, BATCH, BLOCK = 400, 40, 16, 128

RUNS: dict[str, Callable[..., Optimizer]] = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
    "AdamW, beta2 = 0.95": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1, betas=(0.9, 0.95)),
    "AdaPM, every 100, no clamp": lambda p, lr: adapm(p, lr, 100, None),
    "AdaPM, every 100, clamp 1": lambda p, lr: adapm(p, lr, 100, 1.0),
    "AdaPM, every 10, no clamp": lambda p, lr: adapm(p, lr, 10, None),
    "AdaPM, every 10, clamp 3": lambda p, lr: adapm(p, lr, 10, 3.0),
    "AdaPM, every 10, clamp 1": lambda p, lr: adapm(p, lr, 10, 1.0),
}


def adapm(params: Iterable[Tensor], lr: float, gap: int, clip: float | None) -> AdaPM:
    return AdaPM(params, lr=lr, weight_decay=0.1, rank=0.05, update_proj_gap=gap, clip_threshold=clip)


def read_text() -> tuple[Tensor, Tensor]:
    """Bytes of 360 files of the standard library to train on, of 40 others to validate on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(f for f in root.rglob("*.py") if "site-packages" not in f.parts and "/test" not in f.as_posix())
    random.Random(0).shuffle(files)
    parts = (files[40:400], files[:40])
    train, val = (
        torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in part)), dtype=torch.uint8) for part in parts
    )
    return train, val


def batch(data: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(data) - BLOCK - 1, (BATCH,), generator=generator)
    return torch.stack([data[i : i + BLOCK + 1] for i in starts.tolist()]).long()


def loss_of(model: GPT, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(make: Callable[..., Optimizer], lr: float, seed: int, text: tuple[Tensor, Tensor]) -> float:
    """Final validation loss, in nats per byte."""
    torch.manual_seed(seed)
    config = Config(
        n_layer=4, n_head=4, n_query_groups=2, n_embd=128, block_size=BLOCK, padded_vocab_size=256,
        intermediate_size=384, mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", rotary_percentage=1.0, bias=False,
    )  # fmt: skip
    model = GPT(config)
    model.apply(model._init_weights)
    optimizer = make(model.parameters(), lr)
    order = torch.Generator().manual_seed(seed + 1)
    for step in range(STEPS):
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * step / STEPS))
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine * min(1, (step + 1) / WARMUP)
        optimizer.zero_grad()
        loss_of(model, batch(text[0], order)).backward()
        optimizer.step()
    fixed = torch.Generator().manual_seed(9)
    with torch.no_grad():
        return statistics.fmean(loss_of(model, batch(text[1], fixed)).item() for _ in range(20))


def sweep(seed: int, rates: list[float]) -> dict[tuple[str, float], float]:
    torch.set_num_threads(1)
    text, losses = read_text(), {}
    for lr in rates:
        for name, make in RUNS.items():
            start = time.monotonic()
            losses[name, lr] = train(make, lr, seed, text)
            seconds = time.monotonic() - start
            print(f"{name:30s} lr {lr:g} seed {seed}: {losses[name, lr]:.4f} in {seconds:.0f} s", flush=True)
    return losses


def report(results: dict[str, dict[str, list[float]]], rates: list[float], seeds: list[int], command: str) -> str:
    cpu = platform.processor() or platform.machine()
    head = [
        f"Measured on {datetime.date.today()}, {cpu}, {os.cpu_count()} cores (1 thread per seed), Python"
        f" {platform.python_version()}, torch {torch.__version__}: `{command}`.",
        "",
        f"Final validation loss in nats per byte after {STEPS} steps of {BATCH} x {BLOCK} bytes,"
        f" seeds {', '.join(map(str, seeds))}.",
        "",
        "| run | " + " | ".join(f"lr {lr:g}" for lr in rates) + " | mean at its best lr |",
        "|---" * (len(rates) + 2) + "|",
    ]
    for name, losses in results.items():
        cells = [" / ".join(f"{x:.3f}" for x in losses[f"{lr:g}"]) for lr in rates]
        best = min(statistics.fmean(losses[f"{lr:g}"]) for lr in rates)
        head.append(f"| {name} | " + " | ".join(cells) + f" | {best:.3f} |")
    return "\n".join(head) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path of the .json and .md, without a suffix")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one process and thread for each")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 6e-3])
    args = parser.parse_args()
    with ProcessPoolExecutor(len(args.seeds), torch.multiprocessing.get_context("spawn")) as pool:
        by_seed = list(pool.map(sweep, args.seeds, [args.lr] * len(args.seeds)))
    results = {name: {f"{lr:g}": [losses[name, lr] for losses in by_seed] for lr in args.lr} for name in RUNS}
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")
    seeds, rates = " ".join(map(str, args.seeds)), " ".join(f"{lr:g}" for lr in args.lr)
    command = f"python benchmarks/defaults.py --output {args.output} --seeds {seeds} --lr {rates}"
    args.output.with_suffix(".md").write_text(
        "# Refresh interval and clamp\n\n" + report(results, args.lr, args.seeds, command)
    )


if __name__ == "__main__":
    main()
