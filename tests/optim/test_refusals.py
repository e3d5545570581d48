"""What AdaPM cannot do, it says by name."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from models import PlainLM, token_batches
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_adapm import AdaPM
from lightning_adapm.optim import options
from lightning_adapm.roles import assign
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.layout import Layout


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parameters_replaced_after_construction():
    """As DeepSpeed's ZeRO does: one flat float32 tensor instead of the group's parameters."""
    model = PlainLM()
    optimizer = AdaPM(model.named_parameters())
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    with pytest.raises(TypeError, match=r"params\[0\] of shape .* put into AdaPM's parameter group.*DeepSpeed"):
        optimizer.step()


@pytest.mark.parametrize("partly", [False, True], ids=["the model", "one block"])
def test_an_optimizer_that_was_built_before_fully_shard(one_process, partly):
    """As LightningCLI builds it: without an error, what was sharded would not be trained."""
    model = PlainLM()
    optimizer = AdaPM(model.parameters())
    fully_shard(model.layers[1] if partly else model)
    model(token_batches(1)[0]).backward()
    name = r"layers\.1\..*" if partly else "embed.*"
    with pytest.raises(RuntimeError, match=rf"^{name} and \d+ more of .*PlainLM would not be .*configure_optimizers"):
        optimizer.step()


def test_a_head_tied_after_construction_is_not_a_replacement():
    model = PlainLM()
    optimizer = AdaPM(model.parameters())
    model.lm_head.weight = model.embed_tokens.weight
    model(token_batches(1)[0]).backward()
    optimizer.step()


@pytest.mark.parametrize("placements", [[Shard(1), Replicate()], [Shard(0), Shard(0)]])
def test_tensor_parallel_layouts(one_process, placements):
    mesh = init_device_mesh("cpu", (1, 1))
    weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, placements))
    with pytest.raises(TypeError, match="tensor_parallel_size > 1.*not supported"):
        AdaPM([("mlp.weight", weight)])


def test_flat_parameters_without_their_parts(one_process):
    model = FullyShardedDataParallel(PlainLM(), use_orig_params=False, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match="use_orig_params=True"):
        AdaPM(model.parameters())


@pytest.mark.parametrize("trained", [False, True])
def test_stacks_that_fsdp1_cuts_are_refused_where_they_are_trained(trained, monkeypatch):
    """Frozen experts under LoRA are not."""
    monkeypatch.setattr(assign, "layout_of", lambda param: Layout(param.shape, ((0, 9), (9, param.numel())), 0, None))
    experts = torch.nn.Parameter(torch.ones(4, 6, 6), requires_grad=trained)
    named = [("mlp.experts", experts), ("lora_a", torch.nn.Parameter(torch.ones(2, 6)))]
    if not trained:
        AdaPM(named)
        return
    with pytest.raises(TypeError, match=r"mlp.experts \(4, 6, 6\) is a stack of matrices, which FSDP1 cuts anywhere"):
        AdaPM(named)


@pytest.mark.parametrize(("device", "reason"), [("mps", "float64, which MPS"), ("xla", "does not support XLA")])
def test_devices(device, reason):
    param = SimpleNamespace(device=torch.device(device), shape=(2, 2))
    with pytest.raises(TypeError, match=reason):
        options.check_trainable("mlp.weight", Piece("mlp"), param, "error")
