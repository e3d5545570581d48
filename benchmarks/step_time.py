"""Time of the optimizer step alone, every peer next to ``torch.optim.AdamW``: ``python -m benchmarks.step_time``.

The parameters have exactly a model's shapes, the gradients are random. Beside each optimizer stands its floor: the
time to move the bytes that its step has to move (parameters read and written, gradients read, state read and written)
at the bandwidth of a plain copy or scaling in place, measured in the same run.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.optim import Optimizer

from benchmarks.costs.command import LATE, begin, described, parser_of, skipped_cells
from benchmarks.costs.memory import held_bytes, state_bytes, tensors_in
from benchmarks.costs.models import DTYPES, MODELS, free_bytes, materialize, numel, shorten
from benchmarks.costs.peers import BASES, Peer, Result, attempt, build, select
from benchmarks.costs.timing import INTERVAL, bandwidth, launched, time_steps, transient_bytes
from benchmarks.pages.page import mean_and_turns, provenance, session, stacked_bars, table, write
from benchmarks.studies.decoder import Decoder, Shape
from benchmarks.studies.optimizers import Parameters
from lightning_adapm.report.tables import show_bytes, show_count

ELEMENTS = 6
"""Per parameter, what AdamW needs: parameter, gradient, two moments, temporaries, and room to spare."""


@dataclass(frozen=True)
class Plan:
    """Plan of a measurement: model, device, repetitions and time limit.

    ``together``: all optimizers are alive at once and take turns; otherwise each has the memory to itself.
    ``peer_limit``: seconds that the first step of one peer may take, where that can be known before.
    """

    device: str
    repeats: int = 3
    steps: int = 10
    warmup: int = 3
    together: bool = True
    peer_limit: float = math.inf
    deadline: float = math.inf


@dataclass
class Measured:
    """Measurement of one optimizer: seconds of its steps by turn, or the reason why there are none.

    ``refresh``: seconds of a step that refreshes, where the interval is too long for a turn; ``pace``: of the last step
    before the first turn.
    """

    peer: Peer
    pace: float = 0.0
    turns: list[list[float]] = field(default_factory=list)
    refresh: float | None = None
    counts: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None

    def attempt(self, work: Callable[..., Result], *arguments: Any) -> Result | None:
        """Do one part of the work, unless the peer is skipped already."""
        if self.skipped is not None:
            return None
        result, self.skipped = attempt(self.peer, partial(work, *arguments))
        return result

    def steps(self, plan: Plan) -> int:
        """Steps in one turn."""
        return INTERVAL if self.peer.interval == INTERVAL else plan.steps

    @property
    def mean(self) -> float:
        """Seconds of a step over whole intervals between refreshes."""
        step, interval = fmean(taken for turn in self.turns for taken in turn), self.peer.interval
        return step if self.refresh is None else ((interval - 1) * step + self.refresh) / interval

    @property
    def milliseconds(self) -> dict[str, Any]:
        """Summarize the times of a step for results."""
        return {"mean_ms": 1e3 * self.mean, "turns_ms": [1e3 * fmean(turn) for turn in self.turns]}


def measure(model: Decoder, peers: Sequence[Peer], plan: Plan) -> list[Measured]:
    """Every peer's steps on the model's parameters, which they share: what a step costs does not depend on values."""
    of = Parameters.of(model)
    for param in of.tensors:
        param.grad = torch.randn_like(param) * 1e-3
    rows = [Measured(peer) for peer in peers]
    for turn in [rows] if plan.together else [[row] for row in rows]:
        _measure_together(turn, of, plan)
        gc.collect()
        if plan.device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _measure_together(rows: Sequence[Measured], of: Parameters, plan: Plan) -> None:
    prepared = [(row, row.attempt(_prepare, row, of, plan)) for row in rows]
    ready = [(row, optimizer) for row, optimizer in prepared if optimizer is not None]
    # slow ones last, so that the others' turns are close together: who else uses the machine meets them alike
    ready.sort(key=lambda pair: pair[0].pace)
    for turn in range(plan.repeats):
        for row, optimizer in ready:
            if turn == 0 or time.monotonic() < plan.deadline:
                taken = row.attempt(time_steps, optimizer.step, row.steps(plan), plan.device)
                row.turns += [] if taken is None else [taken]
    for row, optimizer in ready:
        row.attempt(_count, row, optimizer, of, plan)


def _prepare(row: Measured, of: Parameters, plan: Plan) -> Optimizer:
    """The optimizer, after its first steps."""
    peer = row.peer
    begin(peer, plan.deadline)
    optimizer = build(peer, of, plan.peer_limit, **({"update_in_backward": False} if peer.in_backward else {}))
    row.pace = time_steps(optimizer.step, plan.warmup, plan.device)[-1]
    return optimizer


def _count(row: Measured, optimizer: Optimizer, of: Parameters, plan: Plan) -> None:
    """Measure everything but times, and the step that refreshes."""
    if row.peer.restart is not None:
        row.peer.restart(optimizer)
        (row.refresh,) = time_steps(optimizer.step, 1, plan.device)
    params, grads = of.tensors, [param.grad for param in of.tensors if param.grad is not None]
    state = state_bytes(optimizer)
    held = [*params, *grads, *tensors_in(list(optimizer.state.values()))]
    steps = min(row.peer.interval, INTERVAL)
    row.counts = {
        "state_bytes": state,
        "floor_bytes": 2 * held_bytes(params) + held_bytes(grads) + 2 * state,
        "transient_bytes": transient_bytes(optimizer.step, steps, plan.device, held),
        "launched": launched(optimizer.step, steps, plan.device, held),
    }


def summarize(rows: Sequence[Measured], speed: float) -> dict[str, dict[str, Any]]:
    """Rows by name: milliseconds, the floor at a ``speed`` in bytes per second, ratios; or why it was skipped."""

    def figures(row: Measured, means: Mapping[str, float]) -> dict[str, Any]:
        floor = row.counts["floor_bytes"] / speed
        return {
            "worst_ms": 1e3 * max([*(taken for turn in row.turns for taken in turn), row.refresh or 0.0]),
            "floor_ms": 1e3 * floor,
            "over_floor": row.mean / floor,
            "ratios": {base: row.mean / means[base] for base in BASES if base in means},
            **row.counts,
        }

    return by_name(rows, figures)


def by_name(
    rows: Sequence[Measured], figures: Callable[[Measured, Mapping[str, float]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Rows by name: milliseconds and the ``figures`` of a row, given the means of all; or why it was skipped."""
    means = {row.peer.name: row.mean for row in rows if row.skipped is None}
    return {
        row.peer.name: {"skipped": row.skipped} if row.skipped is not None else row.milliseconds | figures(row, means)
        for row in rows
    }


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    layers = f"{result['layers']} of {result['all_layers']} layers"
    turns = "taking turns" if result["together"] else "one after another, each with the memory to itself"
    fewer = any(len(row["turns_ms"]) < result["repeats"] for row in result["rows"].values() if "turns_ms" in row)
    count = f"{result['repeats']} turns{' or, where the time limit came, fewer,' if fewer else ''}"
    counted = "kernels" if result["device"] == "cuda" else "operations"
    lines = [
        f"# Time of the optimizer step: {result['model']}, {result['dtype']}, {result['device']}",
        "",
        provenance(result) + f"; {result['threads']} threads",
        "",
        f"{show_count(result['parameters'])} parameters ({layers}) and random gradients, the optimizers {turns}."
        f" The mean is over {count} of whole refresh intervals ({INTERVAL} steps; where 200, one"
        " timed refresh counts as one step in 200), in parentheses the means of the fastest and the slowest turn. The"
        f" floor is the time to move what must be moved at {result['bandwidth'] / 1e9:,.1f} GB/s, the fastest copy or"
        " scaling in place: parameters read and written, gradients read, state read and written. Ratios are of means;"
        " in parentheses of means in the same turn, lowest to highest."
        f" {counted.capitalize()} are the mean of a step; transient is what a step allocates and frees again at most.",
        "",
    ]
    header = ["", "mean ms", "worst ms", "floor ms", "/ floor", *(f"/ {base}" for base in BASES)]
    base = result["rows"].get(BASES[-1], {}).get("turns_ms", []) if result["together"] else []
    rows = [[name, *_cells(row, base, len(header) + 2)] for name, row in result["rows"].items()]
    lines += table([*header, counted, "transient", "state"], rows)
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any], base: Sequence[float], count: int) -> list[str]:
    """``base``: milliseconds of AdamW by turn, if the optimizers took turns."""
    if "skipped" in row:
        return skipped_cells(row["skipped"], count)
    ratios = [f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "" for name in BASES]
    by_turn = [ours / adamw for ours, adamw in zip(row["turns_ms"], base, strict=False)]
    if by_turn:
        ratios[-1] += f" ({min(by_turn):.2f} to {max(by_turn):.2f})"
    return [
        mean_and_turns(row),
        f"{row['worst_ms']:.2f}",
        f"{row['floor_ms']:.2f}",
        f"{row['over_floor']:.2f}",
        *ratios,
        f"{row['launched']:,.0f}",
        show_bytes(row["transient_bytes"]),
        show_bytes(row["state_bytes"]),
    ]


def run(name: str, dtype: str, shape: Shape, peers: Sequence[Peer], plan: Plan, output: Path) -> None:
    """Measure one model in one dtype, and write the JSON, the page and the plot."""
    torch.manual_seed(0)
    model = materialize(shape, plan.device, DTYPES[dtype])
    before = bandwidth(plan.device)
    measured = measure(model, peers, plan)
    best = max(before, bandwidth(plan.device))  # other work on a shared machine must not lower it
    rows = summarize(measured, best)
    result = session("step_time", plan.device) | {
        "threads": torch.get_num_threads(),
        **described(plan.device, name, dtype, shape, MODELS[name].layers),
        "bandwidth": best,
        "repeats": plan.repeats,
        "together": plan.together,
        "rows": rows,
    }
    file = output / f"step_time-{plan.device}-{name}-{dtype}.json"
    bars = {peer: {"step": row["mean_ms"], "floor": row["floor_ms"]} for peer, row in rows.items() if "mean_ms" in row}
    stacked_bars(file.with_suffix(".svg"), f"{name}, {dtype}, {plan.device}", "milliseconds", bars, mark="floor")
    write(file, result, page(result))
    print(file.with_suffix(".md").read_text(), flush=True)


def fitting(name: str, dtype: str, device: str, layers: int | None) -> Shape | None:
    """The model's shape with ``layers`` layers, or as many as AdamW has memory for; None if not even one."""
    if layers is not None:
        return replace(MODELS[name], layers=min(layers, MODELS[name].layers))
    return shorten(MODELS[name], ELEMENTS * DTYPES[dtype].itemsize, free_bytes(device))


def plan_of(args: argparse.Namespace, shape: Shape, dtype: str, peers: Sequence[Peer], deadline: float) -> Plan:
    """Optimizers take turns where the states of all of them fit."""
    on_gpu = args.device == "cuda"
    states = 2 * max(DTYPES[dtype].itemsize, 4) * numel(shape) * len(peers)
    return Plan(
        args.device,
        args.repeats,
        steps=args.steps or (10 if on_gpu else 5),
        warmup=args.warmup or (3 * INTERVAL if on_gpu else 3),  # refreshes are recorded in the third interval
        together=states < free_bytes(args.device) / 2,
        peer_limit=args.peer_limit,
        deadline=deadline,
    )


def parse() -> argparse.Namespace:
    parser = parser_of("step_time", __doc__)
    parser.add_argument(
        "--all", action="store_true", help="every model in every dtype; --model and --dtype are not used"
    )
    parser.add_argument("--layers", type=int, help="of the model; default: all, or as many as AdamW has memory for")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each optimizer")
    parser.add_argument("--steps", type=int, help=f"of a turn, for those that do not refresh every {INTERVAL}")
    parser.add_argument("--warmup", type=int, help="steps before the first turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse()
    peers = tuple(peer for peer in select(args.peers) if not peer.training_only)
    deadline = time.monotonic() + args.time_limit
    torch.set_num_threads(args.threads)
    published_first = sorted(MODELS, key=lambda name: name in ("gpt2", "llama"))
    wanted = [(name, dtype) for name in published_first for dtype in DTYPES] if args.all else [(args.model, args.dtype)]
    for name, dtype in wanted:
        shape = fitting(name, dtype, args.device, args.layers)
        if shape is None or time.monotonic() > deadline:
            reason = "no memory for one layer of it" if shape is None else LATE
            print(f"{name}, {dtype}: skipped: {reason}", flush=True)
            continue
        plan = plan_of(args, shape, dtype, peers, deadline)
        run(name, dtype, shape, peers, plan, args.output)


if __name__ == "__main__":
    main()
