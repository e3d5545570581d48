"""Fits under a Trainer: ``run_trainer.py FOLDER FIT...``, a fit as JSON.

Keys of a fit: ``strategy``, ``job``, ``steps``, ``save`` (a name for the checkpoint at the last step), ``load`` (the
checkpoint to resume from), ``refused`` (whether that has to fail), ``every`` (steps from one checkpoint to the next,
with 0.1 s for each), ``weights`` (a file for the final weights), ``log`` (a file for what the callbacks logged),
``optimizer`` and ``trainer`` (more of its options).
"""

import json
import os
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import lightning as L
import lightning.pytorch.strategies.fsdp as fsdp_module
import torch
from jobs import JOBS, loss_of
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from strategies import leave, on_cuda, shard, weights_of
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.utils.data import DataLoader

from lightning_adapm import AdaPMMixin, ClosingTable, OptimizerStateMonitor, OptimizerSummary, ResidualNormMonitor

TIMEOUT = timedelta(seconds=60)


class CPUFSDPStrategy(FSDPStrategy):
    """Lightning refuses FSDP1 on CPU by the strategy's exact type, and leaves ``device_id`` out of what CPU needs."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )


class AnyPrecision(FSDPPrecision):
    """FSDP1 with the dtype that the model has: Lightning knows float32 and below, these tests compare in float64."""

    mixed_precision_config = None

    def convert_module(self, module):
        return module


def full_state(module, world_size, rank0_only=True):
    """Lightning's own asks for an offload to the CPU, which fails on one."""
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(False, rank0_only),
        FullOptimStateDictConfig(False, rank0_only),
    )


if not on_cuda():
    fsdp_module._get_full_state_dict_context = full_state


class Training(AdaPMMixin, L.LightningModule):
    def __init__(self, job, optimizer="adapm"):
        super().__init__()
        self.job, self.net, self.optimizer_name = job, None, optimizer
        self.adapm = job.settings | {"schedule": "constant"}
        self.first_batch = 0

    def configure_model(self):
        if self.net is None:
            with torch.device("cpu"):  # Lightning would have other random numbers after its meta device
                self.net = self.job.build()
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not hasattr(self.net, "unshard"):
            shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        if self.optimizer_name == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=3e-3)
        return super().configure_optimizers()

    def training_step(self, batch, index):
        time.sleep(self.pause)
        return loss_of(self.net, batch[0].chunk(self.trainer.world_size)[self.global_rank])

    def train_dataloader(self):
        # Lightning goes on with an epoch, but from the first batch that a plain loader gives
        batches = self.job.batches()
        return DataLoader(batches[self.first_batch :] + batches[: self.first_batch], batch_size=1)

    def on_load_checkpoint(self, checkpoint):
        self.first_batch = checkpoint["global_step"]


def strategy_of(name):
    kind, _, state = name.partition(" ")
    if kind == "fsdp1":
        blocks = CustomPolicy(lambda module: type(module).__name__ in ("Block", "OddBlock"))
        options = {"state_dict_type": state or "full", "auto_wrap_policy": blocks, "timeout": TIMEOUT}
        return FSDPStrategy(**options) if on_cuda() else CPUFSDPStrategy(process_group_backend="gloo", **options)
    if kind == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=int(os.environ["WORLD_SIZE"]),
            tensor_parallel_size=1,
            save_distributed_checkpoint=state == "sharded",
            timeout=TIMEOUT,
        )
    return DDPStrategy(timeout=TIMEOUT) if kind == "ddp" else "auto"


def fit(
    folder,
    strategy,
    job,
    steps,
    save=None,
    load=None,
    every=None,
    weights=None,
    log=None,
    optimizer="adapm",
    trainer=None,
):
    callbacks = []
    if log is not None:
        callbacks = [OptimizerStateMonitor(3), ResidualNormMonitor(3), OptimizerSummary(), ClosingTable()]
    if save is not None:
        callbacks += [ModelCheckpoint(folder, save, every_n_train_steps=steps, enable_version_counter=False)]
    if every is not None:
        callbacks += [ModelCheckpoint(folder, "{step}", every_n_train_steps=every, save_top_k=-1)]
    options = trainer or {}
    if strategy.startswith("fsdp1") and "precision" not in options:
        options["plugins"] = [AnyPrecision("32-true")]
    trainer = L.Trainer(
        accelerator="cuda" if on_cuda() else "cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy_of(strategy),
        max_steps=steps,
        callbacks=callbacks,
        enable_checkpointing=bool(save or every),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )
    module = Training(JOBS[job], optimizer)
    module.pause = 0.1 if every else 0.0
    trainer.fit(module, ckpt_path=str(folder / load) if load else None)
    if log is not None and trainer.is_global_zero:
        state, residual = (callback.history for callback in callbacks[:2])
        (folder / log).write_text(json.dumps({"state": state, "residual": residual}))
    if weights is not None:
        trained = weights_of(trainer.strategy.model)
        if trainer.is_global_zero:
            torch.save({name.partition("net.")[2]: value.cpu() for name, value in trained.items()}, folder / weights)


def main(folder, *fits):
    warnings.filterwarnings("ignore")
    environment = dict(os.environ)
    for each in fits:
        os.environ.update(environment)  # Lightning takes its part out at the end of a fit
        options = json.loads(each)
        if not options.pop("refused", False):
            fit(Path(folder), **options)
            continue
        try:
            fit(Path(folder), **options)
        except (Exception, CheckpointException) as error:
            print(f"{options['strategy']} from {options['load']}: {type(error).__name__}: {error}")
        else:
            raise AssertionError(f"{each} was not refused")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
