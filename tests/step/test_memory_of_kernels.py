"""Steps by kernels, interpreted on a CPU: they copy no gradient, keep none, and allocate no more than is planned."""

import gc

import pytest
import torch
from allocations import transient_of_a_step
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_adapm import AdaPM, LoRAPre
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.step import batching
from lightning_adapm.step.transients import held_by_recorded_steps, step_transients

pytest.importorskip("triton", reason="the kernels are Triton's")


def test_first_steps_and_refreshes_copy_no_gradient(interpreted):
    """Where every step refreshes; what is allocated is of the size of factors."""
    weight = nn.Parameter(torch.randn(256, 512).to(torch.bfloat16))
    optimizer = AdaPM([("mlp.weight", weight)], rank=2, state_dtype=None, update_proj_gap=1, second_moment="block")
    optimizer._make_state(weight)
    for number in range(3):
        weight.grad = torch.randn(256, 512, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)
        assert transient_of_a_step(optimizer) < 4 * weight.numel() // 2
    assert {"combine", "move"} <= set(interpreted)


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("probe", [None, ResidualProbe()])
def test_a_step_by_kernels_holds_no_gradient_afterwards(interpreted, second_moment, probe):
    """Not until the garbage collector comes: what frees gradients within backward would free none."""
    weight = nn.Parameter(torch.randn(24, 32).bfloat16())
    optimizer = AdaPM(
        [("mlp.weight", weight)], rank=2, state_dtype=None, update_proj_gap=2, second_moment=second_moment
    )
    optimizer.observer = probe
    gc.disable()
    try:
        for _ in range(3):
            weight.grad = torch.randn(24, 32).bfloat16()
            held = StorageWeakRef(weight.grad.untyped_storage())
            optimizer.step()
            weight.grad = None
            assert held.expired()
    finally:
        gc.enable()


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_a_step_by_kernels_allocates_no_more_than_is_planned(interpreted, second_moment):
    """In the first step, in one that refreshes and in one that does not."""
    torch.manual_seed(0)
    weights = {f"layers.{i}.mlp.weight": nn.Parameter(torch.randn(384, 256).bfloat16()) for i in range(3)}
    optimizer = AdaPM(list(weights.items()), rank=8, state_dtype=None, update_proj_gap=2, second_moment=second_moment)
    of_a_monitor = 4 * 6 * 384 * 256
    bound = step_transients(p for weight in weights.values() for p in optimizer.parts(weight)) - of_a_monitor
    assert bound < sum(4 * weight.numel() for weight in weights.values()) / 2
    for weight in weights.values():
        optimizer._make_state(weight)
    for _ in range(3):
        for weight in weights.values():
            weight.grad = torch.randn(384, 256).bfloat16()
        assert 0 < transient_of_a_step(optimizer) <= bound


@pytest.mark.parametrize("shape", [(384, 256), (256, 384)])
def test_regressions_allocate_no_more_than_is_planned(interpreted, monkeypatch, shape):
    """But not much less: recorded steps keep what is planned."""
    monkeypatch.setattr(batching, "_BATCH_NUMEL", {"cpu": 1 << 26, "cuda": 1 << 26})
    weights = {f"layers.{i}.mlp.weight": nn.Parameter(torch.randn(shape)) for i in range(2)}
    optimizer = LoRAPre(list(weights.items()), rank=16)
    bound = held_by_recorded_steps([p for weight in weights.values() for p in optimizer.parts(weight)])
    for weight in weights.values():
        optimizer._make_state(weight)
    for _ in range(2):
        for weight in weights.values():
            weight.grad = torch.randn(shape)
        found = transient_of_a_step(optimizer)
        assert 0.6 * bound < found <= bound
