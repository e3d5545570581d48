"""What an optimizer cannot do, it says by name."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from models import PlainLM, token_batches
from optimizers import Case, exported
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
    with pytest.raises(TypeError, match=r"params\[0\] of shape .* put into a parameter group of AdaPM.*DeepSpeed"):
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
    with pytest.raises(TypeError, match=r"^mlp\.weight of shape \(4, 6\) .*tensor_parallel_size > 1.*not supported"):
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


@pytest.mark.parametrize(
    ("device", "reason"), [("mps", "MPS devices, which have no float64"), ("xla", "does not support XLA")]
)
def test_devices(device, reason):
    param = SimpleNamespace(device=torch.device(device), shape=(2, 2))
    with pytest.raises(TypeError, match=reason):
        options.check_trainable("AdaPM", "mlp.weight", Piece("mlp"), param, "error")


def test_a_frozen_parameter_that_is_complex_may_not_be_trained_later():
    param = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64), requires_grad=False)
    optimizer = AdaPM([("mlp.weight", param)])
    param.requires_grad_().grad = torch.ones_like(param)
    with pytest.raises(TypeError, match="mlp.weight is complex and now requires a gradient"):
        optimizer.step()


def refuse_a_replaced_parameter(case):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = case([("mlp.weight", weight)])
    optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.ones(16))]
    optimizer.step()


def refuse_a_sparse_gradient(case):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = case([("embed_tokens.weight", weight)])
    weight.grad = torch.ones(4, 4).to_sparse()
    optimizer.step()


def refuse_a_role_that_was_not_found(case):
    weight = torch.nn.Parameter(torch.ones(4, 4), requires_grad=False)
    optimizer = case([("mixer.A", weight), ("norm.weight", torch.nn.Parameter(torch.ones(4)))])
    weight.requires_grad_().grad = torch.ones(4, 4)
    optimizer.step()


def refuse_an_option_of_adamw(case):
    case([{"params": [("mlp.weight", torch.nn.Parameter(torch.ones(4, 4)))], "amsgrad": True}])


def refuse_a_matrix_without_a_role(case):
    case([("mixer.A", torch.nn.Parameter(torch.ones(4, 4)))])


def refuse_a_tensor_without_a_name(case):
    case([torch.nn.Parameter(torch.ones(4, 4))])


def refuse_complex_parameters(case):
    case([("mlp.weight", torch.nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)))])


def refuse_a_state_of_amsgrad(case):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    case([("mlp.weight", weight)]).load_state_dict(torch.optim.AdamW([weight], amsgrad=True).state_dict())


def refuse_entries_without_a_meaning(case):
    weight = torch.nn.Parameter(torch.ones(4, 4))
    saved = torch.optim.AdamW([weight]).state_dict() | {"state": {0: {"step": torch.tensor(1.0), "sum": weight}}}
    case([("mlp.weight", weight)]).load_state_dict(saved)


REFUSALS = (
    refuse_a_replaced_parameter,
    refuse_a_sparse_gradient,
    refuse_a_role_that_was_not_found,
    refuse_an_option_of_adamw,
    refuse_a_matrix_without_a_role,
    refuse_a_tensor_without_a_name,
    refuse_complex_parameters,
    refuse_a_state_of_amsgrad,
    refuse_entries_without_a_meaning,
)


@pytest.mark.parametrize("name", exported())
@pytest.mark.parametrize("refuse", REFUSALS, ids=lambda refuse: refuse.__name__.removeprefix("refuse_"))
def test_no_optimizer_is_called_by_the_name_of_another(refuse, name):
    with pytest.raises((ValueError, TypeError, RuntimeError)) as refused:
        refuse(Case(exported()[name], {"unmatched": "error", "update_in_backward": False}))
    others = exported().keys() - {name}
    assert not others & set(re.findall(r"\w+", str(refused.value)))
