"""What a state on the device holds, and how it moves to a CPU."""

import copy

import pytest
import torch
from on_gpu import NEEDED, compact, gradients, model

from lightning_adapm import AdaPM

pytestmark = NEEDED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_a_float32_state(dtype):
    net = model(dtype).cuda()
    optimizer = compact(net.named_parameters())
    for step in range(12):
        gradients(net, step)
        optimizer.step()
    assert all(param.isfinite().all() for param in net.parameters())
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert {value.dtype for value in held} == {torch.float32}


@pytest.mark.parametrize("state_dtype", ["float16", "bfloat16", "float64", "int8"])
@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_state_of_any_dtype(state_dtype, second_moment):
    net = model().cuda()
    optimizer = AdaPM(
        net.named_parameters(), rank=8, momentum="compact", state_dtype=state_dtype, second_moment=second_moment
    )
    for step in range(6):
        gradients(net, step)
        if step == 3:
            for param in net.parameters():
                param.grad *= 1e8
        optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(value.isfinite().all() for value in (*held, *net.parameters()))


def test_a_state_saved_on_a_gpu_loads_on_a_cpu(tmp_path):
    net = model().cuda()
    optimizer = compact(net.named_parameters())
    gradients(net, 0)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(net).cpu()
    loaded = compact(twin.named_parameters())
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value).cpu(), torch.as_tensor(loaded.state[q][key])), key
