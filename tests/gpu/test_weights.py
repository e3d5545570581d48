"""The same weights as on the CPU, whatever the optimizer, the second moment and the dtypes."""

import pytest
import torch
from on_gpu import NEEDED, NEIGHBORS, compact, gradients, model
from torch import nn

from lightning_adapm import AdaPM, LoRAPre, PartialMuon
from lightning_adapm.moments import orthogonal

pytestmark = NEEDED


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_the_same_weights_as_on_a_cpu(second_moment, dtype, tolerance):
    nets = [model(dtype), model(dtype).cuda()]
    for net in nets:
        optimizer = compact(net.named_parameters(), update_proj_gap=5, second_moment=second_moment)
        for step in range(22):
            gradients(net, step)
            if step == 7:
                net["lm_head"].weight.grad[0, 0] = float("inf")
            optimizer.step()
        assert optimizer.nonfinite_gradients() == {"lm_head.weight": 1}
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert (p - q.cpu()).norm() <= tolerance * p.norm(), name


@pytest.mark.parametrize("name", NEIGHBORS)
def test_the_neighbors_move_as_on_a_cpu(monkeypatch, name):
    """Relative to what they moved, next to products in float32 where a CPU would multiply bfloat16: fast steps multiply
    its rounding to 8 % of a move at 64 rows.
    """
    monkeypatch.setattr(orthogonal, "_multiplies_bfloat16", lambda device: device.type == "cuda")
    make, options = NEIGHBORS[name]
    nets, start = [model(), model().cuda()], model()
    for net in nets:
        optimizer = make(net.named_parameters(), lr=1e-2, **options)
        for step in range(8):
            gradients(net, step)
            if step == 5:
                net["lm_head"].weight.grad[0, 0] = float("inf")
            optimizer.step()
    assert "kernels" in {row.path for row in optimizer.step_paths()}
    for (key, p), q, before in zip(nets[0].named_parameters(), nets[1].parameters(), start.parameters(), strict=True):
        tolerance = {PartialMuon: 0.07, LoRAPre: 1e-3}.get(make, 1e-4)
        assert (p - q.cpu()).norm() <= tolerance * (p - before).norm(), key


@pytest.mark.parametrize("rows", [4096, 16384])
def test_one_head_of_thousands_of_rows(rows):
    nets = [nn.ModuleDict({"q_proj": nn.Linear(96, rows, bias=False)}) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].cuda()
    for net in nets:
        group = {"params": net.named_parameters(), "n_head": 1}
        optimizer = compact([group], rank=5, second_moment="block", update_proj_gap=3, weight_decay=0, eps=1)
        for step in range(5):
            gradients(net, step)
            optimizer.step()
    p, q = (net["q_proj"].weight for net in nets)
    assert (p - q.cpu()).norm() <= 2e-3 * p.norm()


def test_tf32_does_not_reach_the_orthonormalization():
    """litgpt and Lightning switch TF32 on; the bases stay orthonormal to float32's precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        net = model().cuda()
        optimizer = compact(net.named_parameters(), rank=8, update_proj_gap=2)
        for step in range(9):
            gradients(net, step)
            optimizer.step()
    finally:
        torch.set_float32_matmul_precision(before)
    bases = [value for state in optimizer.state.values() for key, value in state.items() if key.endswith("exp_avg_r")]
    assert bases
    for basis in bases:
        torch.testing.assert_close(basis @ basis.mT, torch.eye(8, device="cuda"), rtol=0, atol=2e-6)


def test_autograd_sees_a_step():
    layer = nn.Linear(64, 32, bias=False, device="cuda")
    optimizer = AdaPM([("mlp.weight", layer.weight)])
    loss = layer(torch.ones(2, 64, device="cuda", requires_grad=True)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
