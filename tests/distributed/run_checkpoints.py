"""Saves and loads by torch.distributed.checkpoint: ``run_checkpoints.py FOLDER ACTION...``.

Actions are ``save:STRATEGY:JOB:NAME``, after half of the job's steps, and ``load:STRATEGY:JOB:NAME:OUTPUT``, which
takes the other half.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import JOBS, train_share
from strategies import WRAP, processes, weights_of
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict


def start(strategy, job):
    model = WRAP[strategy](job.build())
    return model, job.optimizer(model)


def save(folder, rank, world_size, strategy, name, file):
    job = JOBS[name]
    model, optimizer = start(strategy, job)
    train_share(model, optimizer, job.batches()[: job.steps // 2], rank, world_size)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / file)
    weights, state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        torch.save({"model": weights, "optimizer": state}, folder / f"{file}.pt")


def load(folder, rank, world_size, strategy, name, file, output):
    job = JOBS[name]
    model, optimizer = start(strategy, job)
    options = StateDictOptions()
    if file.endswith(".pt"):
        saved = torch.load(folder / file, weights_only=True)
        weights, state = saved["model"], saved["optimizer"]
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=strategy in ("fsdp2", "hybrid2"))
    else:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / file)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    train_share(model, optimizer, job.batches()[job.steps // 2 :], rank, world_size)
    trained = weights_of(model)
    if rank == 0:
        torch.save(trained, folder / output)


def main(folder, *actions):
    with processes() as (rank, world_size):
        for action in actions:
            kind, *words = action.split(":")
            {"save": save, "load": load}[kind](Path(folder), rank, world_size, *words)
            dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
