"""Time of the optimizer step alone, AdaPM beside ``torch.optim.AdamW``: ``python -m benchmarks.step_time``.

The parameters of a decoder of 30 million parameters with random gradients. All optimizers take turns, step by step, so
that whatever else the machine does meets all of them; several refresh intervals are timed, refreshes included.
"""

import argparse
import datetime
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW, Optimizer

from benchmarks.decoder import Decoder, Shape
from benchmarks.store import hardware, versions
from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre

SHAPES = {
    "gpt2": Shape(layers=8, width=512, n_head=8, context=512, vocab=8192),
    "llama": Shape(layers=8, width=512, n_head=8, context=512, vocab=4096, llama=True, n_query_groups=4),
}
BASE = "AdamW"
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    BASE: AdamW,
    "AdamW, foreach": lambda params, **kw: AdamW(params, foreach=True, **kw),
    "AdamW, fused": lambda params, **kw: AdamW(params, fused=True, **kw),
    "AdaPM": AdaPM,
    "AdaPM block": lambda params, **kw: AdaPM(params, second_moment="block", **kw),
    "AdaPM factored": lambda params, **kw: AdaPM(params, second_moment="factored", **kw),
    "AdaPM, every step": lambda params, **kw: AdaPM(params, update_proj_gap=1, **kw),
    "AdamMini": AdamMini,
    "AdaLomo": lambda params, **kw: AdaLomo(params, update_in_backward=False, **kw),
    "Lomo": lambda params, **kw: Lomo(params, update_in_backward=False, **kw),
    "LoRAPre": LoRAPre,
    "LoRAPre, Muon": lambda params, **kw: LoRAPre(params, variant="muon", **kw),
}


def measure(shape: Shape, device: str, steps: int, warmup: int) -> tuple[int, dict[str, list[float]]]:
    """Number of parameters, and seconds of every timed step by optimizer."""
    torch.manual_seed(0)
    models = {name: Decoder(shape).to(device) for name in OPTIMIZERS}
    optimizers = {name: make(models[name].parameters(), lr=1e-3, weight_decay=0.1) for name, make in OPTIMIZERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    params = list(models[BASE].parameters())
    for step in range(warmup + steps):
        grads = [torch.randn_like(param) * 1e-3 for param in params]
        for name, optimizer in optimizers.items():
            for param, grad in zip(models[name].parameters(), grads, strict=True):
                param.grad = grad
            taken = timed(optimizer, device)
            if step >= warmup:
                seconds[name].append(taken)
    return sum(param.numel() for param in params), seconds


def timed(optimizer: Optimizer, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def summarise(repeats: list[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    """Milliseconds over all repeats; ``ratio`` of means to AdamW's, one per repeat."""
    rows = {}
    for name in OPTIMIZERS:
        every = [1e3 * taken for repeat in repeats for taken in repeat[name]]
        rows[name] = {
            "mean_ms": statistics.fmean(every),
            "median_ms": statistics.median(every),
            "worst_ms": max(every),
            "ratio": [statistics.fmean(repeat[name]) / statistics.fmean(repeat[BASE]) for repeat in repeats],
            "median_ratio": [statistics.median(repeat[name]) / statistics.median(repeat[BASE]) for repeat in repeats],
        }
    return rows


def page(result: dict[str, Any]) -> str:
    lines = [
        "# Time of the optimizer step",
        "",
        f"{result['date']}, {result['hardware']}, {result['threads']} threads, {result['versions']}:"
        f" `{result['command']}`",
        "",
        f"{result['parameters'] / 1e6:.1f} million parameters ({result['shape']}) on {result['device']}, random"
        f" gradients; {result['repeats']} repeats of {result['steps']} timed steps, the optimizers taking turns;"
        " refreshes (every 10 steps) included. Ratios are to AdamW in the same repeat, lowest to highest repeat.",
        "",
        "| | mean ms | ratio of means | median ms | ratio of medians | worst step ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        ratios = [f"{min(row[key]):.2f} to {max(row[key]):.2f}" for key in ("ratio", "median_ratio")]
        lines.append(
            f"| {name} | {row['mean_ms']:.2f} | {ratios[0]} | {row['median_ms']:.2f} | {ratios[1]} |"
            f" {row['worst_ms']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=40, help="timed in each repeat; a refresh comes every 10")
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured = [measure(SHAPES[args.shape], args.device, args.steps, args.warmup) for _ in range(args.repeats)]
    result = {
        "command": "python -m benchmarks.step_time " + shlex.join(sys.argv[1:]),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "hardware": hardware(args.device),
        "versions": versions(),
        "threads": args.threads,
        "device": args.device,
        "shape": args.shape,
        "parameters": measured[0][0],
        "steps": args.steps,
        "repeats": args.repeats,
        "rows": summarise([seconds for _, seconds in measured]),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / f"step_time-{args.device}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    file.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
