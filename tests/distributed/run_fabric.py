"""Trains, saves and loads under Fabric as litgpt's pretraining does: ``run_fabric.py FOLDER STRATEGY FILE [LOAD]``."""

import os
import sys
from pathlib import Path

import torch
from jobs import JOBS, loss_of
from lightning import Fabric
from lightning.fabric.plugins.precision import FSDPPrecision
from lightning.fabric.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, fsdp
from run_trainer import TIMEOUT, full_state
from strategies import leave, shard, weights_of
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy

from lightning_adapm import AdaPM
from lightning_adapm.roles.context import normalize

JOB = JOBS["gpt block"]


class CPUFSDPStrategy(FSDPStrategy):
    """As the Trainer's in run_trainer.py."""

    def setup_module(self, module):
        options = {"auto_wrap_policy": CustomPolicy(lambda m: type(m).__name__ == "Block"), "use_orig_params": True}
        return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)


class AnyPrecision(FSDPPrecision):
    """The dtype that the model has, in and out: these tests compare in float64."""

    def convert_module(self, module):
        return module

    convert_input = convert_output = convert_module


def strategy_of(name, world_size):
    if name == "fsdp1":
        fsdp._get_full_state_dict_context = full_state
        return CPUFSDPStrategy(process_group_backend="gloo", state_dict_type="full", timeout=TIMEOUT)
    if name == "fsdp2":
        return ModelParallelStrategy(
            lambda module, mesh: shard(module, mesh=mesh["data_parallel"]),
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    return DDPStrategy(timeout=TIMEOUT)


def main(folder, strategy, file, load=None):
    world_size = int(os.environ["WORLD_SIZE"])
    plugins = [AnyPrecision("32-true")] if strategy == "fsdp1" else None
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy_of(strategy, world_size), plugins=plugins)
    fabric.launch()
    model = fabric.setup_module(JOB.build())
    optimizer = fabric.setup_optimizers(AdaPM(model.parameters(), **JOB.settings))
    state = {"model": model, "optimizer": optimizer, "steps": 0}
    if load is not None:
        fabric.load(Path(folder) / load, state)
    half = JOB.steps // 2
    for tokens in JOB.batches()[half:] if load else JOB.batches()[:half]:
        optimizer.zero_grad()
        fabric.backward(loss_of(model, tokens.chunk(world_size)[fabric.global_rank]))
        optimizer.step()
        state["steps"] += 1
    if load is None:
        fabric.save(Path(folder) / file, state)
        return
    assert state["steps"] == JOB.steps
    inner = model._forward_module
    weights = weights_of(inner)
    if fabric.global_rank == 0:
        torch.save({normalize(name): value for name, value in weights.items()}, Path(folder) / file)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
