"""Runs jobs under one strategy and saves the weights: ``run_jobs.py STRATEGY OUTPUT JOB...``.

With a monitor, weights are the same bit for bit. No collective is one that torch calls deprecated.
"""

import sys
import warnings
from dataclasses import replace

import torch
from jobs import JOBS, train_zero
from strategies import WRAP, device, processes, weights_of

WATCHED = "plain factored"


def main(strategy, output, *names):
    warnings.filterwarnings("error", message=".*torch.distributed.* is deprecated")
    weights = {}
    with processes() as (rank, world_size):
        for name in names:
            job = JOBS[name]
            if job.zero:
                weights[name] = weights_of(train_zero(job, rank, world_size))
                continue
            model = job.build().to(device())
            # as LightningCLI does: FSDP1 keeps the parameters, and makes them one-dimensional
            early = job.optimizer(model) if strategy.endswith(" late") else None
            wrapped = WRAP[strategy.removesuffix(" late")](model)
            job.train(wrapped, rank, world_size, early)
            weights[name] = {key: weight.cpu() for key, weight in weights_of(wrapped).items()}
            if name == WATCHED:
                watched = replace(job, watched=True)
                model = WRAP[strategy.removesuffix(" late")](job.build().to(device()))
                probe = watched.train(model, rank, world_size).observer
                assert all(torch.equal(weight.cpu(), weights[name][key]) for key, weight in weights_of(model).items())
                assert any("stationarity" in reading.figures for reading in probe.read())
        if rank == 0:
            torch.save(weights, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
