"""Time of whole training steps (forward, backward, optimizer) by peer: ``python -m benchmarks.training_time``.

What an optimizer adds to a training step is not the time of its step alone: on a GPU the host launches it while forward
and backward still run, and what updates inside backward has no step of its own. So each trains the same decoder on
random tokens, and forward and backward are measured without any optimizer as well.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.costs.command import add_windows, begin, check_length, described, parser_of, skipped_cells
from benchmarks.costs.models import DTYPES, MODELS
from benchmarks.costs.peers import BASES, Peer, select
from benchmarks.costs.timing import INTERVAL, time_steps
from benchmarks.costs.training_step import Setting, Training, free
from benchmarks.pages.page import mean_and_turns, provenance, session, stacked_bars, table, write
from benchmarks.step_time import Measured, Plan, by_name
from benchmarks.studies.decoder import Shape
from lightning_adapm.report.tables import show_count

NOTHING = Peer("forward and backward", "AdamW")
"""The row in which no optimizer steps."""
BASE = BASES[0]
FEW = 3
"""Steps before the first turn of what does not refresh."""


def measure(shape: Shape, peers: Sequence[Peer], setting: Setting, plan: Plan) -> list[Measured]:
    """Training steps with every peer, each with the memory to itself, or all ``together`` and in turns."""
    rows = [Measured(peer) for peer in (NOTHING, *peers)]
    for some in [rows] if plan.together else [[row] for row in rows]:
        _train(some, shape, setting, plan)
        free(setting.device)
    return rows


def _train(rows: Sequence[Measured], shape: Shape, setting: Setting, plan: Plan) -> None:
    trained = [(row, row.attempt(_begin, row, shape, setting, plan)) for row in rows]
    ready = [(row, training) for row, training in trained if training is not None]
    for _ in range(plan.repeats):
        for row, training in ready:
            taken = row.attempt(time_steps, _step(row, training), row.steps(plan), plan.device)
            row.turns += [] if taken is None else [taken]
    for row, training in ready:
        if row.peer.restart is not None and row.skipped is None:
            row.peer.restart(training.optimizer)
            (row.refresh,) = time_steps(_step(row, training), 1, plan.device)


def _begin(row: Measured, shape: Shape, setting: Setting, plan: Plan) -> Training:
    """A training after its first steps, fewer of those that are all alike."""
    begin(row.peer, plan.deadline)
    training = Training(shape, row.peer, setting)
    time_steps(_step(row, training), plan.warmup if row.peer.interval > 1 else min(plan.warmup, FEW), plan.device)
    return training


def _step(row: Measured, training: Training) -> Callable[[], None]:
    return training.gradients if row.peer is NOTHING else training.step


def summarize(rows: Sequence[Measured], tokens: int) -> dict[str, dict[str, Any]]:
    """Rows by name: milliseconds of a step of ``tokens``, the optimizer's share; or the reason for skipping."""

    def figures(row: Measured, means: Mapping[str, float]) -> dict[str, Any]:
        return {
            "added_ms": 1e3 * (row.mean - means[NOTHING.name]) if NOTHING.name in means else None,
            "ratio": row.mean / means[BASE] if BASE in means else None,
            "tokens_per_second": tokens / row.mean,
        }

    return by_name(rows, figures)


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    products = ", products in bfloat16 (autocast)" if result["autocast"] else ""
    times = result.get("accumulate", 1)
    turns = "turns, one optimizer after the other," if result.get("together") else "turns"
    often = f", {times} times before each step" if times > 1 else ""
    lines = [
        f"# Time of a training step: {result['model']}, {result['batch']} x {result['length']} tokens,"
        f" {result['device']}",
        "",
        provenance(result),
        "",
        f"{show_count(result['parameters'])} parameters ({result['layers']} of {result['all_layers']} layers),"
        f" {result['dtype']}, {result['batch']} windows of {result['length']} random tokens{often}{products}. The mean"
        f" is over {result['repeats']} {turns} of whole refresh intervals ({INTERVAL} steps; where 200, one timed"
        " refresh counts as one step in 200), in parentheses the means of the fastest and the slowest turn. Added is"
        " what a step takes beyond forward and backward alone.",
        "",
    ]
    rows = []
    for name, row in result["rows"].items():
        if "skipped" in row:
            rows.append([name, *skipped_cells(row["skipped"], 4)])
            continue
        rows.append(
            [
                name,
                mean_and_turns(row),
                "" if name == NOTHING.name or row["added_ms"] is None else f"{row['added_ms']:.2f}",
                "" if row["ratio"] is None else f"{row['ratio']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
        )
    lines += table(["", "mean ms", "added ms", f"/ {BASE}", "tokens per second"], rows)
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> None:
    """Measure one model, and write the JSON, the page and the plot."""
    shape, on_gpu = MODELS[args.model], args.device == "cuda"
    setting = Setting(
        args.device, DTYPES[args.dtype], args.batch, args.length, args.peer_limit, args.autocast, args.accumulate
    )
    plan = Plan(
        args.device,
        args.repeats,
        steps=INTERVAL if on_gpu else 3,
        warmup=3 * INTERVAL if on_gpu else 2,  # refreshes are recorded in the third interval
        peer_limit=args.peer_limit,
        together=args.together,
        deadline=time.monotonic() + args.time_limit,
    )
    measured = measure(shape, select(args.peers), setting, plan)
    rows = summarize(measured, args.batch * args.length * args.accumulate)
    result = session("training_time", args.device) | {
        **described(args.device, args.model, args.dtype, shape, shape.layers),
        "autocast": args.autocast,
        "batch": args.batch,
        "length": args.length,
        "accumulate": args.accumulate,
        "repeats": plan.repeats,
        "together": plan.together,
        "rows": rows,
    }
    base = rows[NOTHING.name].get("mean_ms", 0.0)
    bars = {
        name: {NOTHING.name: base, "added": max(0.0, row["mean_ms"] - base)}
        for name, row in rows.items()
        if "mean_ms" in row and name != NOTHING.name
    }
    dtype = f"{args.dtype}-autocast" if args.autocast else args.dtype
    windows = f"{args.batch}x{args.length}" + (f"x{args.accumulate}" if args.accumulate > 1 else "")
    file = args.output / f"training_time-{args.device}-{args.model}-{dtype}-{windows}.json"
    stacked_bars(file.with_suffix(".svg"), f"{args.model}, {args.dtype}, {args.device}", "milliseconds", bars)
    write(file, result, page(result))
    print(file.with_suffix(".md").read_text(), flush=True)


def main() -> None:
    parser = parser_of("training_time", __doc__)
    add_windows(parser, batch=8)
    parser.add_argument("--autocast", action="store_true", help="products in bfloat16, as precision bf16-mixed")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each optimizer")
    parser.add_argument("--together", action="store_true", help="all are held in memory, and take turns")
    parser.add_argument("--accumulate", type=int, default=1, help="backward passes of a step, not for updates in them")
    args = parser.parse_args()
    if args.accumulate > 1 and any(peer.in_backward for peer in select(args.peers)):
        parser.error("--accumulate is not for peers that update inside backward; leave them out of --peers")
    check_length(parser, args.length, args.model, MODELS[args.model])
    run(args)


if __name__ == "__main__":
    main()
