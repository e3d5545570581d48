"""Steps that are replayed from CUDA graphs: bit by bit those that are launched."""

import copy

import pytest
import torch
from on_gpu import NEEDED, NEIGHBORS, gradients, model, step_without_waiting
from torch import nn

from lightning_adapm import AdaPM, PartialMuon
from lightning_adapm.report.plan import cached_bytes
from lightning_adapm.step.recorder import MOST_BYTES
from lightning_adapm.step.transients import held_by_recorded_steps

pytestmark = NEEDED


def recorded_kinds(optimizer):
    return sum(len(recorder._recordings) for recorder in optimizer._engine._recorders.values())


def twins_trained(dtype, steps, before=lambda step, optimizers: None, make=AdaPM, **options):
    """Weights and state with recorded steps and without, after each step, and the optimizer that records."""
    nets = [model(dtype).cuda() for _ in range(2)]
    low_rank = {"rank": 3, "update_proj_gap": 4} if make in (AdaPM, PartialMuon) else {}
    optimizers = [make(net.named_parameters(), **low_rank | options) for net in nets]
    optimizers[0].most_recorded_bytes, optimizers[1].most_recorded_bytes = MOST_BYTES, 0
    elsewhere = []
    for step in range(steps):
        before(step, optimizers)
        for net, optimizer in zip(nets, optimizers, strict=True):
            elsewhere.append([param.grad for param in net.parameters() if step % 3])  # the next lie in other memory
            gradients(net, step)
            if step % 7 == 5:
                net["lm_head"].weight.grad[0, 0] = float("nan")
            if step == 14:
                net["embed"].weight.grad = None
            step_without_waiting(optimizer, may_wait=step == 0)
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(p, q), (step, name)
            for key, value in optimizers[1].state[q].items():
                assert torch.equal(torch.as_tensor(optimizers[0].state[p][key]), torch.as_tensor(value)), (step, key)
    assert optimizers[0].nonfinite_gradients() == optimizers[1].nonfinite_gradients()
    return optimizers[0]


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_are_those_that_are_launched(second_moment, dtype):
    """Bit by bit and without waiting, with another learning rate in every step and gradients in other places."""
    kinds = []

    def before(step, optimizers):
        kinds.append(recorded_kinds(optimizers[0]))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)

    optimizer = twins_trained(dtype, 28, before, second_moment=second_moment)
    assert max(kinds[:14]) == 3 and recorded_kinds(optimizer) > 0  # ordinary steps, and refreshes of either phase
    assert {row.launches for row in optimizer.step_paths()} == {"replayed"}
    assert 0 < optimizer.cached_bytes() <= cached_bytes(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_that_move_together_inside_backward_are_recorded(dtype):
    """Bit by bit as those that are launched, and within the plan of what is kept. So is the norm of the gradients."""
    nets, options = [model(dtype).cuda() for _ in range(2)], {"rank": 3, "update_proj_gap": 4}
    optimizers = [AdaPM(net.named_parameters(), update_in_backward=True, **options) for net in nets]
    optimizers[1].most_recorded_bytes = 0
    for step in range(20):
        for net, optimizer in zip(nets, optimizers, strict=True):
            gradients(net, step)
            products = [(param * param.grad).sum() for param in net.parameters()]
            true = torch.nn.utils.get_total_norm([param.grad.float() for param in net.parameters()])
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            optimizer.step(torch.stack(products).sum().backward)
            torch.testing.assert_close(optimizer.gradient_norm, true)
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(p, q), (step, name)
    first = optimizers[0]
    assert len(first._engine._recorders) > 1 and {row.launches for row in first.step_paths()} == {"replayed"}
    assert 0 < first.cached_bytes() <= cached_bytes(first)


def test_large_matrices_are_recorded_within_their_bound():
    """Graphs of all kinds of steps keep no more than the largest of these needs, by shapes alone."""
    shapes = {f"layers.{i}.mlp.{name}.weight": (4096, 1024) for i in range(8) for name in ("gate_proj", "up_proj")}
    params = [(name, nn.Parameter(torch.randn(shape, device="cuda"))) for name, shape in shapes.items()]
    params.append(("embed.weight", nn.Parameter(torch.randn(65536, 1024, device="cuda"))))
    optimizer = AdaPM(params, second_moment="factored", update_proj_gap=5)
    for _ in range(16):
        for _, param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert {row.launches for row in optimizer.step_paths()} == {"replayed"}
    assert recorded_kinds(optimizer) == 5
    bound = held_by_recorded_steps([part for _, param in params for part in optimizer.parts(param)])
    assert bound < optimizer.most_recorded_bytes
    assert optimizer._engine._pool.nbytes <= bound + 2**24  # small tensors have blocks of their own


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_recorded_steps_with_smaller_state(state_dtype):
    assert recorded_kinds(twins_trained(torch.float32, 12, state_dtype=state_dtype, second_moment="block")) == 3


def test_recorded_orthogonal_updates():
    """Descriptors of tiles are part of a graph."""
    optimizer = twins_trained(torch.float32, 28, make=PartialMuon)
    assert {row.launches for row in optimizer.step_paths()} == {"replayed"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdaLomo", "Lomo", "LoRAPre"])
def test_all_of_a_neighbor_s_step_is_recorded(name, dtype):
    make, options = NEIGHBORS[name]
    optimizer = twins_trained(dtype, 12, make=make, **options)
    assert {(row.path, row.launches) for row in optimizer.step_paths()} == {("kernels", "replayed")}


def test_recorded_steps_after_loading_a_state():
    def before(step, optimizers):
        if step == 9:
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                assert recorded_kinds(optimizer) == 0

    assert recorded_kinds(twins_trained(torch.float32, 14, before, second_moment="block")) > 0
