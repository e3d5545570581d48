"""Strategies, as people use them, and the processes that they run on."""

import functools
import os
import sys
import tempfile
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from litgpt import GPT
from models import PlainLM
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn.parallel import DistributedDataParallel

from lightning_adapm.litgpt.weights import give_shards, map_weights, place_later, take_weights
from lightning_adapm.roles.context import normalize


def on_cuda():
    """Whether this is a process of test_strategies_on_gpu.py; all others train on the CPU."""
    return os.environ.get("STRATEGIES_ON") == "cuda"


def device():
    """This process's."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda() else torch.device("cpu")


@contextmanager
def processes():
    """The process group of a script that was started by :func:`launch.run_processes`."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['STORE']}"
    if on_cuda():
        torch.cuda.set_device(device())
    backend = "nccl" if on_cuda() else "gloo"
    dist.init_process_group(backend, store, timedelta(seconds=60), rank=rank, world_size=world_size)
    yield rank, world_size
    dist.barrier()
    leave()


def leave():
    """End a process that has done its work: gloo's threads now and then abort an interpreter that shuts down."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


def blocks_of(model):
    """The modules that are wrapped by themselves."""
    model = getattr(model, "_fsdp_wrapped_module", model)
    if isinstance(model, GPT):
        return list(model.transformer.h)
    return list(model.layers if isinstance(model, PlainLM) else model.h)


def shard(model, **options):
    """FSDP2, as it is used: every block, then the rest."""
    for block in blocks_of(model):
        fully_shard(block, **options)
    return fully_shard(model, **options)


def flatten(model, **options):
    """FSDP1, likewise: every block is one flat parameter, and the rest another."""
    policy = CustomPolicy(lambda module: any(module is block for block in blocks_of(model)))
    options |= {"auto_wrap_policy": policy, "use_orig_params": True, "device_id": device()}
    return FullyShardedDataParallel(model, **options)


def checkpointed(model):
    """With a wrapper around every block, which recomputes its activations."""
    blocks = blocks_of(model)
    apply_activation_checkpointing(model, check_fn=lambda module: any(module is block for block in blocks))
    return model


def shard_without_memory(model):
    """FSDP2 of a model on the meta device, whose weights are loaded where they will stay."""
    weights = model.state_dict()
    sharded = shard(model.to("meta")).to_empty(device=device())
    set_model_state_dict(sharded, weights, options=StateDictOptions(full_state_dict=True))
    return sharded


def shard_from_file(model):
    """FSDP2 of a model whose weights are mapped from a file, of which each process reads its share."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save(model.state_dict(), path)
        saved = map_weights(path)
    take_weights(model, next(model.parameters()).dtype)
    give_shards(shard(model), saved)
    return model


def flatten_from_file(model):
    """FSDP1 of a model whose weights come from elsewhere, one module after another."""
    place = place_later(model, device(), next(model.parameters()).dtype)
    assert all(param.is_meta for param in model.parameters())
    return flatten(model, param_init_fn=place)


compiled = functools.partial(torch.compile, backend="eager")  # as any backend, it wraps: code is another matter


def pairs():
    """Every two processes hold the model together, as on the nodes of a cluster."""
    return init_device_mesh(device().type, (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))


WRAP = {
    "single": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp1": flatten,
    "fsdp2": shard,
    "hybrid1": lambda model: flatten(model, device_mesh=pairs(), sharding_strategy=ShardingStrategy.HYBRID_SHARD),
    "hybrid2": lambda model: shard(model, mesh=pairs()),
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled ddp of checkpointed": lambda model: compiled(DistributedDataParallel(checkpointed(model))),
    "fsdp1 of checkpointed": lambda model: flatten(checkpointed(model)),
    "checkpointed fsdp1": lambda model: checkpointed(flatten(model)),
    "fsdp2 of checkpointed": lambda model: shard(checkpointed(model)),
    "compiled fsdp2": lambda model: compiled(shard(model)),
    "fsdp2 offloaded": lambda model: shard(model, offload_policy=CPUOffloadPolicy(pin_memory=on_cuda())),
    "fsdp2 from meta": shard_without_memory,
    "fsdp2 from file": shard_from_file,
    "fsdp1 from file": flatten_from_file,
}


def weights_of(model):
    """Whole weights by clean names; on every process, to be called on all of them."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {normalize(name): param.detach().clone() for name, param in model.named_parameters()}
    return {normalize(name): full(param.detach()) for name, param in model.named_parameters()}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
