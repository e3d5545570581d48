"""The page of :mod:`benchmarks.step_time_sharded`."""

from typing import Any

from benchmarks.costs.timing import INTERVAL
from benchmarks.pages.page import mean_and_turns, provenance, table
from lightning_adapm.report.tables import show_bytes, show_count

BASE, MUON, ALONE = "AdamW, fused", "PartialMuon", "Newton-Schulz alone"
"""Rows that the page relates to each other."""


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    how = "sharded block by block (FSDP2)" if result["strategy"] == "fsdp2" else "whole on each (DDP)"
    lines = [
        f"# Time of a step on {result['processes']} processes: {result['model']}, {result['strategy']},"
        f" {result['device']}",
        "",
        provenance(result),
        "",
        f"{show_count(result['parameters'])} parameters ({result['layers']} of {result['all_layers']} layers) in"
        f" {result['dtype']}, {how}, products in bfloat16, {result['batch']} x {result['length']} random tokens on each"
        f" process. All optimizers are there at once and take turns, {_turns(result, 'step')} alone{_training(result)},"
        f" of {INTERVAL} steps each, which is one interval between refreshes; in parentheses are means of the fastest"
        " and the slowest turn. Times are means over processes. Host is the median time until a step is launched.",
        "",
    ]
    header = ["", "median ms", "mean ms", "worst ms", f"mean / {BASE}", "host ms", "training step ms", "state"]
    header += ["exchanged per step", "at most", "collectives per step", "at most", "waiting steps"]
    base = result["rows"].get(BASE, {}).get("step")
    rows = [[name, *_cells(row, base)] for name, row in result["rows"].items()]
    return "\n".join([*lines, *table(header, rows), *_apart(result["rows"])]) + "\n"


def _apart(rows: dict[str, Any]) -> list[str]:
    """A sentence about what PartialMuon's step takes longer than Newton-Schulz alone, if both were measured."""
    if not rows.keys() >= {BASE, MUON, ALONE}:
        return []
    base, whole, alone = (fastest(rows[name]["step"]) for name in (BASE, MUON, ALONE))
    return [
        "",
        f"In the fastest turn of each, {MUON}'s step takes {whole - alone:.2f} ms longer than {ALONE}, which is"
        f" {(whole - alone) / base:.2f} times {BASE}.",
    ]


def fastest(step: dict[str, Any]) -> float:
    """Milliseconds of a step in the fastest turn: a single disturbed step can double the mean of its turn."""
    return min(step["turns_ms"])


def _turns(result: dict[str, Any], kind: str) -> int:
    """Number of turns that there was time for."""
    return min(len(row[kind]["turns_ms"]) for row in result["rows"].values() if kind in row)


def _training(result: dict[str, Any]) -> str:
    """Words about turns of training steps, if there were any."""
    if "forward_and_backward_ms" not in result:
        return ""
    alone = f"{result['forward_and_backward_ms']:.1f} ms"
    return f" and {_turns(result, 'training')} in training, where forward and backward alone take {alone}"


def _cells(row: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    step, training, exchanged = row["step"], row.get("training"), row["exchanged"]
    waits = "" if row["waiting_steps"] is None else f"{row['waiting_steps']} of {INTERVAL}"
    return [
        f"{step['median_ms']:.2f}",
        mean_and_turns(step),
        f"{step['worst_ms']:.2f}",
        ratio_and_turns(step, base),
        f"{row['host_ms']:.2f}",
        "" if training is None else mean_and_turns(training),
        show_bytes(row["state_bytes"]),
        show_bytes(exchanged["step"]),
        show_bytes(exchanged["most"]),
        *(str(row["collectives"][key]) for key in ("step", "most")),
        waits,
    ]


def ratio_and_turns(step: dict[str, Any], base: dict[str, Any] | None) -> str:
    """The cell of the ratio of means, with the lowest and the highest of one turn."""
    if base is None:
        return ""
    by_turn = [ours / theirs for ours, theirs in zip(step["turns_ms"], base["turns_ms"], strict=True)]
    return f"{step['mean_ms'] / base['mean_ms']:.2f} ({min(by_turn):.2f} to {max(by_turn):.2f})"
