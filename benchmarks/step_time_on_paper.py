"""Time of a sharded optimizer step on 8 to 1,024 GPUs, computed: ``python -m benchmarks.step_time_on_paper``.

Measured are the kernels' rates on one GPU, from the committed results of ``benchmarks.step_time``. The rates of links,
the latency of a collective and that rows go through the same kernels are assumptions, which stand on the page.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.costs.models import MODELS, Exact
from benchmarks.pages.page import RESULTS, provenance, session, table, write
from benchmarks.studies.base import as_published
from benchmarks.studies.decoder import Decoder, Shape
from lightning_adapm import AdaPM
from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.report.plan import plan
from lightning_adapm.report.scaling import scaling

KERNELS = "step_time-cuda-llama-3-8b-float32.json"
"""Results of kernels that are bound by the GPU's memory."""
LLAMA = Exact(layers=0, width=0, n_head=0, context=8192, llama=True, n_query_groups=8, vocab=128256)
SHAPES: dict[str, Shape] = {
    "llama-3-8b": MODELS["llama-3-8b"],
    "llama-3-70b": replace(LLAMA, layers=80, width=8192, n_head=64, hidden=28672),
    "llama-3.1-405b": replace(LLAMA, layers=126, width=16384, n_head=128, hidden=53248),
}
GPUS = (8, 16, 64, 256, 1024)
GAP = 10
"""Steps between two refreshes, the default and what was measured."""
COLLECTIVES = 2
"""Number of collectives of a step: one for finite gradients and sums, and one for sharded bases."""


@dataclass(frozen=True)
class Links:
    """Assumed bytes per second and direction of one GPU, and seconds of a collective that moves next to nothing."""

    node: int = 8
    """GPUs of a node."""
    inside: float = 0.8 * 450e9
    """NVLink of an H100, of whose 450 GB/s per direction four fifths are reached."""
    between: float = 0.8 * 50e9
    """A 400 Gbit/s adapter per GPU, likewise."""
    latency: float = 30e-6

    def seconds(self, size: float, collectives: int, gpus: int) -> float:
        """Time of some collectives through which each GPU gets ``size`` bytes in all."""
        return size / (self.inside if gpus <= self.node else self.between) + collectives * self.latency


class Rates(NamedTuple):
    """Rates measured on one GPU."""

    adamw: float
    """Seconds per parameter of the fused AdamW."""
    ordinary: float
    """Seconds per parameter of a step of AdaPM block that refreshes nothing."""
    refresh: float
    """Seconds of a refresh of every basis, per multiplication of :func:`orthonormal_work`."""


@cache
def planned(model: str) -> AdaPM:
    """An optimizer of parameters that have no memory."""
    with torch.device("meta"):
        return AdaPM(Decoder(SHAPES[model]).named_parameters(), **as_published(second_moment="block"))


def orthonormal_work(optimizer: AdaPM, gpus: int) -> float:
    """Multiplications of one of ``gpus`` GPUs that make all bases orthonormal: the sum of ``r²(n / gpus + r)``.

    Products of rows are divided by columns; every GPU factorizes the small matrices itself.
    """
    total = 0.0
    for param in optimizer.pieces:
        for part in optimizer.parts(param):
            if isinstance(part.first, LowRankMomentum):
                rank, n = part.entries["exp_avg_r"].shape[-2:]  # type: ignore[index]
                total += rank * rank * (n / gpus + rank)
    return total


def rates(results: Path = RESULTS) -> Rates:
    """Rates of the committed results."""
    found = json.loads((results / KERNELS).read_text())
    rows, parameters = found["rows"], found["parameters"]
    # a step of the second row refreshes everything, one of the first a tenth of it on average
    refresh = (rows["AdaPM, every step"]["mean_ms"] - rows["AdaPM"]["mean_ms"]) / (1 - 1 / GAP)
    ordinary = rows["AdaPM block"]["mean_ms"] - refresh / GAP
    optimizer = planned("llama-3-8b")
    work = orthonormal_work(optimizer, 1) * found["layers"] / found["all_layers"]
    return Rates(
        rows["AdamW, fused"]["mean_ms"] / parameters / 1e3,
        ordinary / parameters / 1e3,
        refresh / work / 1e3,
    )


def row(model: str, gpus: int, measured: Rates, links: Links) -> dict[str, Any]:
    """Seconds and bytes on each of ``gpus`` GPUs."""
    optimizer = planned(model)
    cost = scaling(optimizer, gpus, "shard")
    lines = plan(optimizer)
    parameters = sum(line.numel for line in lines)
    state = cost.momentum + sum(line.bytes.total - line.bytes.momentum for line in lines) / gpus
    kernels = measured.ordinary * parameters / gpus + measured.refresh * orthonormal_work(optimizer, gpus) / GAP
    exchange = links.seconds(cost.step + cost.refresh / GAP, COLLECTIVES, gpus)
    return {
        "model": model,
        "gpus": gpus,
        "state": state,
        "adamw_state": sum(line.adamw.total for line in lines) / gpus,
        "adamw": measured.adamw * parameters / gpus,
        "kernels": kernels,
        "exchange": exchange,
        "gradients": links.seconds(cost.gradients, 0, gpus),
    }


def page(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    measured, links = Rates(**result["rates"]), Links(**result["links"])
    header = ["model", "GPUs", "state per GPU", "AdamW's", "fused AdamW ms", "kernels ms", "exchange ms"]
    header += ["gradients' exchange ms"]
    cells = [
        [
            each["model"],
            f"{each['gpus']:,}",
            f"{each['state'] / 2**20:,.1f} MiB",
            f"{each['adamw_state'] / 2**20:,.0f} MiB",
            *(f"{1e3 * each[key]:.2f}" for key in ("adamw", "kernels", "exchange", "gradients")),
        ]
        for each in result["rows"]
    ]
    lines = [
        "# Time of a sharded optimizer step, on paper",
        "",
        provenance(result),
        "",
        "Nothing on this page was run on several GPUs. Parameters are float32 under FSDP2, over all GPUs. AdaPM has the"
        " paper's settings, the block second moment and sharded bases.",
        "",
        "Measured on one H100, with the kernels of 2026-11-26:",
        "",
        f"- Fused AdamW takes {1e12 * measured.adamw:.1f} ps per parameter, AdaPM block {1e12 * measured.ordinary:.1f}"
        f" ps in a step without a refresh (`{KERNELS}`).",
        "- The rest of a refreshing step takes time in proportion to `r²n`, which makes bases of rank `r` and width `n`"
        f" orthonormal: {1e-9 / measured.refresh * 1e-3:.2f} T multiplications a second. Llama-3.2-1B's result has the"
        " same rate. GPUs divide `r²n` among them, and each factorizes all matrices `r x r`.",
        "",
        "Assumed:",
        "",
        f"- Links of {links.inside / 1e9:.0f} GB/s inside nodes of {links.node} GPUs and of {links.between / 1e9:.0f}"
        f" GB/s per GPU between them, and {1e6 * links.latency:.0f} µs for a collective that moves next to nothing.",
        f"- Rows on a GPU go through the kernels at the same rate, with {COLLECTIVES} collectives in a step. All else"
        " is replayed as CUDA graphs, and nothing overlaps.",
        "",
        *table(header, cells),
        "",
        "The state stays small on any number of GPUs. The time does not shrink below the exchange of bases and the"
        " small factorizations of refreshes. **From 16 GPUs on, fused AdamW's part of the step is shorter at every size"
        " here**, by some 3 % of what the sum of the gradients takes on the same links. Sharding within nodes and"
        " replicating between them keeps the exchange at its time for 8 GPUs, and the state, too.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time_on_paper", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    measured, links = rates(), Links()
    result = session("step_time_on_paper", "cpu") | {
        "rates": measured._asdict(),
        "links": vars(links),
        "rows": [row(model, gpus, measured, links) for model in SHAPES for gpus in GPUS],
    }
    write(args.output / "step_time_on_paper.json", result, page(result))
    print((args.output / "step_time_on_paper.md").read_text())


if __name__ == "__main__":
    main()
