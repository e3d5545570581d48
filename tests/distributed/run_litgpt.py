"""litgpt's command line with its FSDP1 on the CPU, where Lightning refuses it: ``run_litgpt.py pretrain ...``."""

import litgpt.finetune.full
import litgpt.pretrain
import torch
from lightning.fabric.strategies import FSDPStrategy, fsdp
from litgpt.__main__ import main
from run_trainer import TIMEOUT, full_state
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_adapm.__main__ import _leave_process_group


class CPUFSDPStrategy(FSDPStrategy):
    """With litgpt's options; HYBRID_SHARD, which counts GPUs, becomes what it is on one machine."""

    def __init__(self, sharding_strategy="FULL_SHARD", **options):
        super().__init__(sharding_strategy="FULL_SHARD", process_group_backend="gloo", timeout=TIMEOUT, **options)

    def setup_module(self, module):
        options = {"sharding_strategy": self.sharding_strategy, **self._fsdp_kwargs}
        module = FullyShardedDataParallel(module, device_id=torch.device("cpu"), **options)
        fsdp._setup_activation_checkpointing(module, self._activation_checkpointing_kwargs)
        return module


if __name__ == "__main__":
    fsdp._get_full_state_dict_context = full_state
    litgpt.pretrain.FSDPStrategy = litgpt.finetune.full.FSDPStrategy = CPUFSDPStrategy
    main()
    _leave_process_group()
