"""Time of a step on several GPUs or processes, sharded or not: ``python -m benchmarks.step_time_sharded``.

Every process holds its share of a decoder under FSDP2, or all of it under DDP. All optimizers are there at once, on the
same parameters, and take turns: first with their step alone, then in whole training steps. Times are means over
processes, each between events in its own stream.

Of PartialMuon's step, Newton-Schulz is measured apart, alone on the same GPUs. What the step takes longer is the cost
of all the rest. Without Newton-Schulz, that takes longer still, because nothing hides exchanges of matrices.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.costs.command import add_windows, check_length, described, parser_of
from benchmarks.costs.models import DTYPES, MODELS, materialize
from benchmarks.costs.peers import Peer, build, chosen, select
from benchmarks.costs.processes import over_processes, run_on
from benchmarks.costs.timing import INTERVAL, time_steps
from benchmarks.pages.page import session, write
from benchmarks.pages.step_time_sharded import ALONE, BASE, MUON, page
from benchmarks.studies.decoder import Shape
from benchmarks.studies.optimizers import Parameters
from lightning_adapm.report.plan import measure as held_state
from lightning_adapm.sharding.collectives import TRAFFIC

_BLOCK = {"second_moment": "block"}
_PAPER = {"momentum": "paper", "rank": 0.05, "state_dtype": None}
PEERS: tuple[Peer, ...] = (
    Peer(BASE, "AdamW", {"fused": True}),
    Peer("AdaPM", "AdaPM", interval=INTERVAL),
    Peer("AdaPM factored", "AdaPM", {"second_moment": "factored"}, interval=INTERVAL),
    Peer("AdaPM block, bases replicated", "AdaPM", _BLOCK | {"basis": "replicate"}, interval=INTERVAL),
    Peer("AdaPM block, bases sharded", "AdaPM", _BLOCK | {"basis": "shard"}, interval=INTERVAL),
    Peer("AdaPM block, paper", "AdaPM", _PAPER | _BLOCK, interval=INTERVAL),
    Peer("AdamMini", "AdamMini"),
    Peer(MUON, "PartialMuon", interval=INTERVAL),
    Peer(ALONE, "Newton-Schulz"),
    Peer("PartialMuon without Newton-Schulz", "Bookkeeping", interval=INTERVAL),
)
STRATEGIES = ("fsdp2", "ddp")
WARM = 3 * INTERVAL
"""Steps before any are measured, in which all kinds of steps are recorded."""
PROFILED = 2 * INTERVAL
"""Steps under the profiler."""


@dataclass(frozen=True)
class Job:
    """Job of every process; ``deadline`` is a time of ``time.monotonic()``, which all of a machine share."""

    device: str
    strategy: str
    shape: Shape
    dtype: str
    batch: int
    length: int
    repeats: int
    deadline: float
    step_only: bool
    """Whether to leave out training steps, which take the longest."""
    peers: tuple[Peer, ...]
    profiled: tuple[Peer, ...]
    described: dict[str, Any]
    """What the page has besides what is measured."""
    output: Path
    """File of the result."""


@dataclass
class Row:
    """Measurement of one optimizer: seconds of its steps by turn, alone and in training."""

    peer: Peer
    optimizer: Optimizer
    alone: list[list[float]] = field(default_factory=list)
    training: list[list[float]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether its training steps mean anything."""
        return self.peer.kind not in ("Newton-Schulz", "Bookkeeping")


class Replica:
    """This process's part of a decoder that several train, on random tokens of its own."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(0)
        self._job = job
        self.decoder = materialize(job.shape, job.device, DTYPES[job.dtype])
        self._model: nn.Module = self.decoder
        if job.strategy == "ddp":
            self._model = DistributedDataParallel(self.decoder, gradient_as_bucket_view=True)
        else:
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            for part in (*self.decoder.blocks, self.decoder):
                fully_shard(part, mp_policy=policy)
        torch.manual_seed(1 + dist.get_rank())
        self._tokens = torch.randint(job.shape.vocab, (job.batch, job.length + 1), device=job.device)

    def gradients(self) -> None:
        """Forward and backward, with products in bfloat16."""
        for param in self.decoder.parameters():
            param.grad = None
        autocast = torch.autocast(self._job.device, torch.bfloat16) if self._job.strategy == "ddp" else nullcontext()
        with autocast:
            loss = F.cross_entropy(self._model(self._tokens[:, :-1]), self._tokens[:, 1:].flatten())
        loss.backward()

    def training_step(self, optimizer: Optimizer) -> None:
        self.gradients()
        optimizer.step()


def work(job: Job) -> None:
    """Measure every optimizer on this process, together with the others.

    The first process writes the page after every turn, so that a run which is cut off leaves what it has measured.
    """
    replica = Replica(job)
    replica.gradients()
    of = Parameters.of(replica.decoder)
    rows = [Row(peer, build(peer, of, float("inf"))) for peer in job.peers]
    for row in rows:
        _say(f"{row.peer.name}: first steps")
        time_steps(row.optimizer.step, WARM, job.device)
    for row in rows:
        row.counts = _count(row.optimizer, job.device)
    for _ in _turns_of(job, rows, lambda row: row.optimizer.step, "alone"):
        _write(job, rows)
    _profile(job, [row for row in rows if row.peer in job.profiled])
    if job.step_only:
        return
    time_steps(replica.gradients, 2, job.device)
    nothing = _seconds_by_step([time_steps(replica.gradients, INTERVAL, job.device)])
    trained = [row for row in rows if row.trains]
    for _ in _turns_of(job, trained, lambda row: lambda: replica.training_step(row.optimizer), "training"):
        _write(job, rows, forward_and_backward_ms=1e3 * fmean(nothing[0]))


def _write(job: Job, rows: Sequence[Row], **more: float) -> None:
    """Write the result and the page of what has been measured."""
    found = {row.peer.name: _summarized(row) for row in rows}  # by all processes
    if dist.get_rank() == 0:
        result = job.described | more | {"rows": found}
        write(job.output, result, page(result))


def _turns_of(job: Job, rows: Sequence[Row], step_of: Callable[[Row], Callable[[], None]], kind: str) -> Iterator[None]:
    """Whole refresh intervals of every optimizer in turn; what no time is left for after the first turn is left out."""
    for turn in range(job.repeats):
        if turn and _late(job.deadline):
            return
        for row in rows:
            dist.barrier()
            taken = time_steps(step_of(row), INTERVAL, job.device)
            getattr(row, kind).append(taken)
            _say(f"{row.peer.name}, {kind}: {1e3 * fmean(taken):.2f} ms, at most {1e3 * max(taken):.2f}")
        yield


def _late(deadline: float) -> bool:
    """Whether the time is over for any process, so that all of them stop together."""
    return any(over_processes(time.monotonic() > deadline))


def _count(optimizer: Optimizer, device: str) -> dict[str, Any]:
    """Bytes of state and of collectives, time of the host, and steps in which it waits for a GPU."""
    exchanged, collectives, waits, host = [], [], 0, []
    for _ in range(INTERVAL):
        _synchronize(device)
        before, began = (TRAFFIC.bytes, TRAFFIC.collectives), time.perf_counter()
        waits += _waits(optimizer, device)
        host.append(time.perf_counter() - began)
        exchanged.append(TRAFFIC.bytes - before[0])
        collectives.append(TRAFFIC.collectives - before[1])
    return {
        "state_bytes": max(over_processes(held_state(optimizer).total)),
        "exchanged": {"step": min(exchanged), "most": max(exchanged)},
        "collectives": {"step": min(collectives), "most": max(collectives)},
        "host_ms": 1e3 * median(host),
        "waiting_steps": max(over_processes(waits)) if device == "cuda" else None,
    }


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _waits(optimizer: Optimizer, device: str) -> bool:
    """Take a step on an idle GPU, and return whether the host waited for it."""
    if device != "cuda":
        optimizer.step()
        return False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # an error on one process would let the others wait
        optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
    return any("synchronizing" in str(each.message) for each in caught)


def _profile(job: Job, rows: Sequence[Row]) -> None:
    """Write what the first process's host and GPU do in the steps of some optimizers."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if job.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for row in rows:
        if _late(job.deadline):
            return
        dist.barrier()
        with torch.profiler.profile(activities=activities) if dist.get_rank() == 0 else nullcontext() as profile:
            time_steps(row.optimizer.step, PROFILED, job.device)
        if profile is not None:
            ops = profile.key_averages()
            sorts = ["self_cpu_time_total", *(["self_device_time_total"] if job.device == "cuda" else [])]
            tables = [ops.table(sort_by=by, row_limit=40, max_name_column_width=70) for by in sorts]
            with job.output.with_name(f"{job.output.stem}-profile.txt").open("a") as file:
                file.write("\n".join([f"{row.peer.name}: {PROFILED + 1} steps", *tables, ""]))


def _seconds_by_step(turns: Sequence[Sequence[float]]) -> list[list[float]]:
    """Means over processes, step by step."""
    by_process = over_processes(turns)
    return [[fmean(step) for step in zip(*turn, strict=True)] for turn in zip(*by_process, strict=True)]


def _times(turns: Sequence[Sequence[float]]) -> dict[str, Any]:
    seconds = [taken for turn in turns for taken in turn]
    return {
        "median_ms": 1e3 * median(seconds),
        "mean_ms": 1e3 * fmean(seconds),
        "worst_ms": 1e3 * max(seconds),
        "turns_ms": [1e3 * fmean(turn) for turn in turns],
    }


def _summarized(row: Row) -> dict[str, Any]:
    found = row.counts | {"step": _times(_seconds_by_step(row.alone))}
    return found | ({"training": _times(_seconds_by_step(row.training))} if row.training else {})


def _say(words: str) -> None:
    if dist.get_rank() == 0:
        print(words, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> None:
    """Measure one model on some processes, and write the JSON and the page."""
    shape = MODELS[args.model]
    if args.layers is not None:
        shape = replace(shape, layers=min(args.layers, shape.layers))
    stem = f"step_time_sharded-{args.strategy}-{args.processes}-{args.device}-{args.model}-{args.dtype}"
    peers = select(args.peers, PEERS)
    if args.strategy == "ddp":  # where every process has all of every basis
        peers = tuple(peer for peer in peers if peer.options.get("basis") != "shard")
    args.output.mkdir(parents=True, exist_ok=True)
    about = session("step_time_sharded", args.device) | {
        **described(args.device, args.model, args.dtype, shape, MODELS[args.model].layers),
        "strategy": args.strategy,
        "processes": args.processes,
        "batch": args.batch,
        "length": args.length,
        "repeats": args.repeats,
    }
    job = Job(
        args.device,
        args.strategy,
        shape,
        args.dtype,
        args.batch,
        args.length,
        args.repeats,
        time.monotonic() + args.time_limit,
        args.step_only,
        peers,
        select(args.profile, PEERS),
        about,
        args.output / f"{stem}.json",
    )
    run_on(args.processes, args.device, work, job)
    print((args.output / f"{stem}.md").read_text(), flush=True)


def main() -> None:
    parser = parser_of("step_time_sharded", __doc__, PEERS)
    add_windows(parser, batch=2)
    parser.add_argument("--processes", type=int, default=2, help="of this machine, each with a GPU of its own")
    parser.add_argument("--strategy", choices=STRATEGIES, default="fsdp2")
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each optimizer")
    parser.add_argument("--step-only", action="store_true", help="leave out training steps, which take the longest")
    words = partial(chosen, peers=PEERS)
    parser.add_argument(
        "--profile", nargs="*", type=words, default=[], metavar="NAME", help="also write their profiles"
    )
    args = parser.parse_args()
    check_length(parser, args.length, args.model, MODELS[args.model])
    run(args)


if __name__ == "__main__":
    main()
