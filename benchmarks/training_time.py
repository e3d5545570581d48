"""Time of whole training steps (forward, backward, optimizer) by peer: ``python -m benchmarks.training_time``.

What an optimizer adds to a training step is not the time of its step alone: on a GPU the host launches it while forward
and backward still run, and what updates inside backward has no step of its own. So each trains the same decoder on
random tokens, and forward and backward are measured without any optimizer as well.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.decoder import Shape
from benchmarks.models import DTYPES, MODELS, numel
from benchmarks.optimizers import UnavailableError
from benchmarks.pages import RESULTS, provenance, session, stacked_bars, table, write
from benchmarks.peers import BASES, Peer, chosen, select
from benchmarks.step_time import INTERVAL, Measured, Plan
from benchmarks.timing import time_steps
from benchmarks.training_step import Setting, Training, free
from lightning_adapm.tables import show_count

NOTHING = Peer("forward and backward", "AdamW")
"""The row in which no optimizer steps."""
BASE = BASES[0]


def measure(shape: Shape, peers: Sequence[Peer], setting: Setting, plan: Plan) -> list[Measured]:
    """Training steps with every peer, one after another, each with the memory to itself."""
    rows = [Measured(peer) for peer in (NOTHING, *peers)]
    for row in rows:
        row.attempt(_train, row, shape, setting, plan)
        free(setting.device)
    return rows


def _train(row: Measured, shape: Shape, setting: Setting, plan: Plan) -> None:
    if time.monotonic() > plan.deadline:
        raise UnavailableError("no time left (--time-limit)")
    print(row.peer.name, file=sys.stderr, flush=True)
    training = Training(shape, row.peer, setting)
    step = training.gradients if row.peer is NOTHING else training.step
    time_steps(step, plan.warmup, plan.device)
    row.turns = [time_steps(step, row.steps(plan), plan.device) for _ in range(plan.repeats)]
    if row.peer.restart is not None:
        row.peer.restart(training.optimizer)
        (row.refresh,) = time_steps(step, 1, plan.device)


def summarise(rows: Sequence[Measured], tokens: int) -> dict[str, dict[str, Any]]:
    """By name: milliseconds of a step with so many ``tokens``, what the optimizer adds; or why it was skipped."""
    means = {row.peer.name: row.mean for row in rows if row.skipped is None}
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.skipped is not None:
            found[row.peer.name] = {"skipped": row.skipped}
            continue
        found[row.peer.name] = {
            "mean_ms": 1e3 * row.mean,
            "turns_ms": [1e3 * fmean(turn) for turn in row.turns],
            "added_ms": 1e3 * (row.mean - means[NOTHING.name]),
            "ratio": row.mean / means[BASE] if BASE in means else None,
            "tokens_per_second": tokens / row.mean,
        }
    return found


def page(result: dict[str, Any], plot: str | None) -> str:
    """The result as Markdown."""
    products = ", products in bfloat16 (autocast)" if result["autocast"] else ""
    lines = [
        f"# Time of a training step: {result['model']}, {result['batch']} x {result['length']} tokens,"
        f" {result['device']}",
        "",
        provenance(result),
        "",
        f"{show_count(result['parameters'])} parameters ({result['layers']} of {result['all_layers']} layers),"
        f" {result['dtype']}, {result['batch']} windows of {result['length']} random tokens{products}. The mean is over"
        f" {result['repeats']} turns of whole refresh intervals ({INTERVAL} steps; where 200, one timed refresh counts"
        " as one step in 200), in parentheses the means of the fastest and the slowest turn. Added is what a step takes"
        " beyond forward and backward alone.",
        "",
    ]
    rows = []
    for name, row in result["rows"].items():
        if "skipped" in row:
            rows.append([name, f"skipped: {row['skipped']}".replace("|", "/"), "", "", ""])
            continue
        turns = row["turns_ms"]
        rows.append(
            [
                name,
                f"{row['mean_ms']:.2f} ({min(turns):.2f} to {max(turns):.2f})",
                f"{row['added_ms']:.2f}" if name != NOTHING.name else "",
                "" if row["ratio"] is None else f"{row['ratio']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
        )
    lines += table(["", "mean ms", "added ms", f"/ {BASE}", "tokens per second"], rows)
    lines += ["", f"![Time of a training step]({plot})"] if plot else []
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> None:
    """Measure one model, and write the JSON, the page and the plot."""
    shape, on_gpu = MODELS[args.model], args.device == "cuda"
    setting = Setting(args.device, DTYPES[args.dtype], args.batch, args.length, args.peer_limit, args.autocast)
    plan = Plan(
        args.device,
        args.repeats,
        steps=INTERVAL if on_gpu else 3,
        warmup=INTERVAL if on_gpu else 2,
        peer_limit=args.peer_limit,
        deadline=time.monotonic() + args.time_limit,
    )
    measured = measure(shape, select(args.peers), setting, plan)
    rows = summarise(measured, args.batch * args.length)
    result = session("training_time", args.device) | {
        "device": args.device,
        "model": args.model,
        "dtype": args.dtype,
        "autocast": args.autocast,
        "layers": shape.layers,
        "all_layers": shape.layers,
        "parameters": numel(shape),
        "batch": args.batch,
        "length": args.length,
        "repeats": plan.repeats,
        "rows": rows,
    }
    base = rows[NOTHING.name].get("mean_ms", 0.0)
    bars = {
        name: {NOTHING.name: base, "added": max(0.0, row["added_ms"])}
        for name, row in rows.items()
        if "mean_ms" in row and name != NOTHING.name
    }
    dtype = f"{args.dtype}-autocast" if args.autocast else args.dtype
    file = args.output / f"training_time-{args.device}-{args.model}-{dtype}-{args.batch}x{args.length}.json"
    plot = file.with_suffix(".svg")
    drawn = stacked_bars(plot, f"{args.model}, {args.dtype}, {args.device}", "milliseconds", bars)
    write(file, result, page(result, plot.name if drawn else None))
    print(file.with_suffix(".md").read_text(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_time", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters")
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16, as precision bf16-mixed")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--peers", nargs="*", type=chosen, metavar="NAME", help="parts of names; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each optimizer")
    parser.add_argument("--peer-limit", type=float, default=20, help="seconds that a refresh by SVDs may take")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds, after which the rest is skipped")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    shape = MODELS[args.model]
    if not shape.rotary and args.length > shape.context:
        parser.error(f"--length must be at most {shape.context} for {args.model}, but got {args.length}")
    run(args)


if __name__ == "__main__":
    main()
