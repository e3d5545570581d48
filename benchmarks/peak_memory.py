"""Memory of one training step (forward, backward, optimizer) by peer: ``python -m benchmarks.peak_memory``.

The peak is split into parameters, gradients, activations, optimizer state and what is transient, at the moment when
most is alive. With ``--budget`` also the deepest model of the same width that trains within so many bytes: layers are
bisected, and each number of them is tried by real training steps.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.costs.command import LATE, add_windows, check_length, described, parser_of, skipped_cells
from benchmarks.costs.models import DTYPES, MODELS, free_bytes, numel
from benchmarks.costs.peers import OUT_OF_MEMORY, Peer, attempt, select
from benchmarks.costs.training_step import PARTS, Setting, free, measure
from benchmarks.pages.page import provenance, session, stacked_bars, table, write
from benchmarks.studies.decoder import Shape
from lightning_adapm.report.tables import read_bytes, show_bytes, show_count


def deepest(shape: Shape, peer: Peer, setting: Setting, checkpointing: bool, budget: int) -> dict[str, int]:
    """The most layers whose training step stays within ``budget`` bytes, with its parameters and peak; 0 if none.

    Bisected between a number that was measured to fit and one that was not; the guess in between is where the line
    through the last two peaks meets the budget.
    """
    peaks: dict[int, float] = {}

    def peak(layers: int) -> float:
        try:
            found: float = measure(replace(shape, layers=layers), peer, setting, checkpointing)["peak"]
        except torch.OutOfMemoryError:
            found = math.inf
        peaks[layers] = found
        print(f"  {layers} layers: {show_bytes(found)}", file=sys.stderr, flush=True)
        return found

    least = numel(replace(shape, layers=1)) * setting.dtype.itemsize
    if least > budget or peak(1) > budget:
        return {"layers": 0, "parameters": 0, "peak": 0}
    low, high = 1, 0
    while high != low + 1:
        guess = _between(peaks, low, high, budget)
        if peak(guess) <= budget:
            low = guess
        else:
            high = guess
    return {"layers": low, "parameters": numel(replace(shape, layers=low)), "peak": int(peaks[low])}


def _between(peaks: dict[int, float], low: int, high: int, budget: int) -> int:
    """A number of layers above ``low`` and below ``high`` (0: unknown), near where the budget is used up."""
    known = sorted(layers for layers in peaks if math.isfinite(peaks[layers]))[-2:]
    if len(known) < 2:
        return low + 1
    slope = (peaks[known[1]] - peaks[known[0]]) / (known[1] - known[0])
    expected = low + int((budget - peaks[low]) / slope) if slope > 0 else 2 * low
    return max(low + 1, min(expected, high - 1) if high else expected)


def measure_peer(shape: Shape, peer: Peer, setting: Setting, budget: int | None) -> dict[str, Any]:
    """The parts without and with checkpointing, and the deepest model if there is a budget; or why there is nothing."""
    row: dict[str, Any] = {}
    for checkpointing in (False, True):
        parts, skipped = attempt(peer, partial(measure, shape, peer, setting, checkpointing))
        row[_key(checkpointing)] = {"skipped": skipped} if parts is None else parts
        if budget is not None and (parts is not None or skipped == OUT_OF_MEMORY):
            found, skipped = attempt(peer, partial(deepest, shape, peer, setting, checkpointing, budget))
            row[_key(checkpointing)]["deepest"] = {"skipped": skipped} if found is None else found
    free(setting.device)
    return row


def _key(checkpointing: bool) -> str:
    return "checkpointing" if checkpointing else "plain"


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    seen = "the parts are counted by following the tensors that operations return"
    by = f"the peak is the allocator's, {seen}" if result["device"] == "cuda" else seen
    lines = [
        f"# Memory of a training step: {result['model']}, {result['dtype']}, {result['device']}",
        "",
        provenance(result),
        "",
        f"{show_count(result['parameters'])} parameters ({result['layers']} of {result['all_layers']} layers),"
        f" {result['batch']} windows of {result['length']} tokens. Each row is the moment of a step when most is alive;"
        f" {by}. Transient is all that is none of the others; what updates inside backward frees gradients early.",
    ]
    for key, title in (("plain", "Without"), ("checkpointing", "With")):
        rows = [[name, *_cells(row[key])] for name, row in result["rows"].items()]
        lines += ["", f"## {title} activation checkpointing", "", *table(["", "peak", *PARTS], rows)]
    if result["budget"] is not None:
        lines += ["", *_budget_lines(result)]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    if "skipped" in row:
        return skipped_cells(row["skipped"], 1 + len(PARTS))
    return [show_bytes(row["peak"]), *(show_bytes(row[part]) for part in PARTS)]


def _budget_lines(result: dict[str, Any]) -> list[str]:
    lines = [
        f"## The largest model within {show_bytes(result['budget'])}",
        "",
        "Layers of the same width, bisected; each number of them was trained, and the peak is measured.",
        "",
    ]
    rows = []
    for name, row in result["rows"].items():
        cells = [name]
        for key in ("plain", "checkpointing"):
            found = row[key].get("deepest", row[key])
            if "skipped" in found:
                cells += skipped_cells(found["skipped"], 3)
            else:
                cells += [str(found["layers"]), show_count(found["parameters"]), show_bytes(found["peak"])]
        rows.append(cells)
    header = ["layers", "parameters", "peak"]
    return lines + table(["", *header, *(f"{word}, checkpointing" for word in header)], rows)


def byte_count(words: str) -> int:
    """The type of a ``--budget`` option."""
    try:
        return read_bytes(words)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace, shape: Shape, peers: Sequence[Peer]) -> None:
    """Measure one model, and write the JSON, the page and the plots."""
    deadline = time.monotonic() + args.time_limit
    setting = Setting(args.device, DTYPES[args.dtype], args.batch, args.length, args.peer_limit)
    rows: dict[str, Any] = {}
    for peer in peers:
        print(peer.name, file=sys.stderr, flush=True)
        late = {"skipped": LATE}
        over = time.monotonic() > deadline
        rows[peer.name] = (
            {_key(c): late for c in (False, True)} if over else measure_peer(shape, peer, setting, args.budget)
        )
    result = session("peak_memory", args.device) | {
        **described(args.device, args.model, args.dtype, shape, MODELS[args.model].layers),
        "batch": args.batch,
        "length": args.length,
        "budget": args.budget,
        "rows": rows,
    }
    file = args.output / f"peak_memory-{args.device}-{args.model}-{args.dtype}.json"
    write(file, result, page(result))
    plot(file, result)
    print(file.with_suffix(".md").read_text(), flush=True)


def plot(file: Path, result: dict[str, Any]) -> None:
    """Draw the pictures next to ``file``."""
    for key, suffix in (("plain", ".svg"), ("checkpointing", "-checkpointing.svg")):
        bars = {
            name: {part: row[key][part] / 2**20 for part in PARTS}
            for name, row in result["rows"].items()
            if "peak" in row[key]
        }
        picture = file.with_name(file.stem + suffix)
        title = f"{result['model']}, {result['dtype']}, {result['device']}" + (
            ", checkpointing" if "-" in suffix else ""
        )
        stacked_bars(picture, title, "MiB", bars)


def main() -> None:
    parser = parser_of("peak_memory", __doc__)
    add_windows(parser, batch=4)
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--budget", type=byte_count, help="also find the largest model that trains within it, as 24GiB")
    args = parser.parse_args()
    shape = MODELS[args.model]
    check_length(parser, args.length, args.model, shape)
    free = free_bytes(args.device)
    if args.budget is not None and args.budget > free:
        parser.error(f"--budget must be at most the {show_bytes(free)} that are free on {args.device}")
    run(args, replace(shape, layers=args.layers or shape.layers), select(args.peers))


if __name__ == "__main__":
    main()
