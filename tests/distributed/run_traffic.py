"""Counts what each step exchanges and what each process keeps: ``run_traffic.py OUTPUT BASIS``."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from jobs import JOBS, train_share
from strategies import processes, shard

from lightning_adapm.report.plan import measure
from lightning_adapm.sharding.collectives import TRAFFIC


def main(output, basis):
    with processes() as (rank, world_size):
        job = JOBS["gpt float32"]
        model = shard(job.build())
        optimizer = replace(job, options={"basis": basis}).optimizer(model)
        exchanged = []
        for batch in job.batches():
            before = TRAFFIC.bytes
            train_share(model, optimizer, [batch], rank, world_size)
            exchanged.append(TRAFFIC.bytes - before)
        kept = [None] * world_size
        dist.all_gather_object(kept, measure(optimizer).momentum)
        if rank == 0:
            Path(output).write_text(json.dumps({"exchanged": exchanged, "kept": kept}))


if __name__ == "__main__":
    main(*sys.argv[1:])
