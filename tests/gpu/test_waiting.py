"""No step after the first waits for the device, watched or not; a monitor changes no bit."""

import warnings

import pytest
import torch
from on_gpu import NEEDED, NEIGHBORS, compact, gradients, model, step_without_waiting

from lightning_adapm.report.diagnostics import ResidualProbe

pytestmark = NEEDED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NEIGHBORS)
def test_no_step_of_the_neighbors_waits_for_the_device(name, dtype):
    """Watched or not: a monitor changes no bit."""
    make, options = NEIGHBORS[name]
    weights = []
    for probe in (None, ResidualProbe()):
        net = model(dtype).cuda()
        optimizer = make(net.named_parameters(), **options)
        optimizer.observer = probe
        for step in range(7):
            gradients(net, step)
            step_without_waiting(optimizer, may_wait=step == 0)
        weights.append([param.detach() for param in net.parameters()])
    assert all(map(torch.equal, *weights)) and all(param.isfinite().all() for param in weights[0])


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_after_the_first_waits_for_the_device(second_moment, dtype):
    """Neither a normal step, nor a refresh, nor one with a gradient that is not finite."""
    net = model(dtype).cuda()
    optimizer = compact(net.named_parameters(), update_proj_gap=3, second_moment=second_moment)
    for step in range(12):
        gradients(net, step)
        if step == 5:
            net["lm_head"].weight.grad[0, 0] = float("nan")
        step_without_waiting(optimizer, may_wait=step == 0)
    assert all(param.isfinite().all() for param in net.parameters())


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_monitor_changes_no_bit_and_waits_for_nothing(second_moment, dtype):
    weights = []
    for watched in (False, True):
        net = model(dtype).cuda()
        optimizer = compact(net.named_parameters(), update_proj_gap=3, second_moment=second_moment)
        probe = optimizer.observer = ResidualProbe() if watched else None
        for step in range(7):
            gradients(net, step)
            step_without_waiting(optimizer, may_wait=step == 0)
        weights.append([param.detach() for param in net.parameters()])
        paths = {row.path for row in optimizer.step_paths()}
    assert all(map(torch.equal, *weights)) and paths == {"kernels"}
    assert any("stationarity" in reading.figures for reading in probe.read())


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_learning_rate_on_the_device_is_read_once_per_step_and_group(in_backward):
    """Whatever the number of batches."""
    net = model().cuda()
    named = list(net.named_parameters())
    groups = [{"params": named[:5]}, {"params": named[5:], "lr": torch.tensor(1e-3, device="cuda")}]
    rate = torch.tensor(1e-2, device="cuda")
    optimizer = compact(groups, lr=rate, update_proj_gap=3, update_in_backward=in_backward)

    def closure():
        for index, param in enumerate(net.parameters()):
            (param * (index + 1)).sum().backward()

    for step in range(4):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn" if step else "default")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step(closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [each for each in caught if "synchronizing" in str(each.message)]
        assert len(waits) == (2 if step else 0)
        assert optimizer.param_groups[0]["lr"] is rate


def test_gradients_that_are_all_broken_are_noticed_without_waiting():
    net = model().cuda()
    optimizer = compact(net.named_parameters())
    gradients(net, 0)
    optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            for param in net.parameters():
                param.grad = torch.full_like(param, float("nan"))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert sum("every gradient held an infinity" in str(each.message) for each in caught) == 1
