"""Momentum and traffic of AdaPM as published on many processes: ``python -m benchmarks.scaling``.

On paper for a large model on up to 1,024 processes, the table of docs/distributed.md; and for a small one both on paper
and as counted on 1, 2 and 4 real ones (gloo, FSDP2).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard

from benchmarks.costs.models import MODELS
from benchmarks.costs.processes import over_processes, run_on
from benchmarks.pages.page import RESULTS, provenance, session, stacked_bars, table, write
from benchmarks.studies.base import as_published
from benchmarks.studies.decoder import Decoder, Shape
from lightning_adapm import AdaPM
from lightning_adapm.report.plan import measure
from lightning_adapm.report.scaling import Scaling, scaling
from lightning_adapm.sharding.collectives import TRAFFIC

LARGE = "llama-3-8b"
SMALL = Shape(layers=2, width=64, n_head=4, n_query_groups=2, context=16, vocab=256, llama=True)
GAP = 3
"""Steps from one refresh to the next, in the small model."""
WINDOWS = 4
"""Windows per step of the small model, divided among the processes."""


class Counted(NamedTuple):
    """Measured bytes on all processes: ``kept`` and ``state`` by process."""

    kept: list[int]
    state: list[int]
    step: int
    refresh: int


def paper(shape: Shape, world_size: int, basis: str, **options: Any) -> Scaling:
    """The cost of a model that is only planned."""
    with torch.device("meta"):
        return scaling(AdaPM(Decoder(shape).named_parameters(), **as_published(**options)), world_size, basis)


def count(world_size: int, basis: str) -> Counted:
    """Train the small model on as many processes, and count; all of them are gone afterwards."""
    exchanged, kept, state = run_on(world_size, "cpu", _train, basis)
    interval = exchanged[1 : 1 + GAP]  # the first step also finds out where there is a gradient
    step = min(interval)
    return Counted(kept, state, step, sum(interval) - GAP * step)


def _train(basis: str) -> tuple[list[int], list[int], list[int]]:
    """One process: an interval of steps after the first, each of whose bytes are counted."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Decoder(SMALL)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = AdaPM(model.named_parameters(), **as_published(update_proj_gap=GAP, basis=basis))
    exchanged = []
    for _ in range(1 + GAP):
        tokens = torch.randint(SMALL.vocab, (WINDOWS, SMALL.context + 1)).chunk(world_size)[rank]
        before = TRAFFIC.bytes
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        exchanged.append(TRAFFIC.bytes - before)
    held = measure(optimizer)
    kept, state = zip(*over_processes((held.momentum, held.total)), strict=True)
    return exchanged, list(kept), list(state)


def bases(world_size: int) -> Sequence[str]:
    return ("replicate", "shard") if world_size > 1 else ("replicate",)


def counted_rows(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The small model, counted and on paper."""
    return [
        {
            "processes": size,
            "basis": basis,
            "counted": count(size, basis)._asdict(),
            "paper": paper(SMALL, size, basis, update_proj_gap=GAP)._asdict(),
        }
        for size in sizes
        for basis in bases(size)
    ]


def large_rows(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """The large model on paper."""
    return [paper(MODELS[LARGE], size, basis)._asdict() for size in sizes for basis in bases(size)]


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    counted = []
    for row in result["counted"]:
        seen, planned = row["counted"], row["paper"]
        alone = row["processes"] == 1
        counted.append(
            [
                str(row["processes"]),
                row["basis"],
                " + ".join(f"{size:,}" for size in seen["kept"]),
                f"{row['processes']} * {planned['momentum']:,.0f}",
                f"{max(seen['state']):,}",
                *(f"{seen[key]:,}" for key in ("step", "refresh")),
                *("0" if alone else f"{planned[key]:,}" for key in ("step", "refresh")),
            ]
        )
    header = ["processes", "basis", "momentum by process", "on paper", "largest state of a process"]
    header += ["exchanged per step", "at a refresh", "per step, on paper", "at a refresh, on paper"]
    lines = [
        "# AdaPM on many processes",
        "",
        provenance(result),
        "",
        "## Counted",
        "",
        f"Bytes of a decoder of {SMALL.layers} layers of width {SMALL.width} in float32, trained under FSDP2 on"
        f" processes of one machine (gloo), every basis refreshed once in {GAP} steps. Gradients are"
        f" {result['counted'][0]['paper']['gradients']:,} bytes. Of a fused weight, the processes with the value's rows"
        " keep all of its full momentum, so that shares differ. On paper is what every process would keep on average.",
        "",
        *table(header, counted),
        "",
        f"## On paper: {LARGE}, rank 0.05, float32",
        "",
        "Exchanged bytes as a share of the gradients' bytes.",
        "",
        *table(*large_table(result["large"])),
    ]
    return "\n".join(lines) + "\n"


def large_table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of docs/distributed.md's table."""
    header = ["processes", "basis", "momentum per process", "saved", "exchanged per step", "at a refresh"]
    cells = []
    for row in rows:
        exchanged = (row["step"], row["refresh"]) if row["world_size"] > 1 else (0, 0)
        cells.append(
            [
                str(row["world_size"]),
                row["basis"],
                f"{row['momentum'] / 2**20:,.1f} MiB",
                f"{100 * (1 - row['momentum'] / row['adamw']):.1f} %",
                *(f"{100 * size / row['gradients']:.3g} %" for size in exchanged),
            ]
        )
    return header, cells


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="real ones, of this machine")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = session("scaling", "cpu") | {
        "counted": counted_rows(args.processes),
        "large": large_rows((1, 2, 4, 8, 16, 32, 64, 256, 1024)),
    }
    bars = {f"{row['world_size']}, {row['basis']}": {"momentum": row["momentum"] / 2**20} for row in result["large"]}
    file = args.output / "scaling.json"
    stacked_bars(file.with_suffix(".svg"), f"{LARGE}: momentum per process", "MiB", bars)
    write(file, result, page(result))
    print((args.output / "scaling.md").read_text())


if __name__ == "__main__":
    main()
