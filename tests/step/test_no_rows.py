"""A process that holds no row of some matrices, by kernels interpreted on a CPU: as by torch's operations."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from models import tiny_gpt
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_adapm import AdaPM, PartialMuon
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.step import kernels, paths

pytest.importorskip("triton", reason="the kernels are Triton's")


@pytest.fixture
def last_of_four(monkeypatch):
    """This process is the last of four. Others have nothing to add to its sums, and columns like its own."""

    def gather(into, given, group, async_op):
        into.view(4, -1).copy_(given.expand(4, -1))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_gather_into_tensor", gather)
    monkeypatch.setattr(dist, "all_gather_single", gather, raising=False)
    dist.init_process_group("fake", rank=3, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


def trained(**options):
    """Weights of a model with six columns, and readings. The last rows of its fused weight are no query's."""
    torch.manual_seed(0)
    model = fully_shard(tiny_gpt(n_layer=1, n_embd=6, n_head=4, n_query_groups=1, head_size=2, intermediate_size=8))
    optimizer = AdaPM(
        model.named_parameters(), rank=2, update_proj_gap=2, state_dtype=None, **{"momentum": "compact"} | options
    )
    optimizer.observer = ResidualProbe()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for param in model.parameters():
            held = torch.randn(param.to_local().shape, generator=generator)
            param.grad = DTensor.from_local(
                held, param.device_mesh, param.placements, shape=param.shape, stride=param.stride()
            )
        optimizer.step()
    readings = sorted(optimizer.observer.read(), key=lambda reading: (reading.name, reading.role))
    return [param.to_local().detach() for param in model.parameters()], readings


@pytest.mark.parametrize(
    ("second_moment", "basis"), [("factored", "shard"), ("block", "replicate"), ("elementwise", "replicate")]
)
def test_moves_and_is_watched(interpreted, monkeypatch, last_of_four, second_moment, basis):
    """Also with no column of bases."""
    weights, readings = trained(second_moment=second_moment, basis=basis)
    assert "move" in interpreted
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, reference = trained(second_moment=second_moment, basis=basis)
    torch.testing.assert_close(weights, expected)
    for found, wanted in zip(readings, reference, strict=True):
        assert found[:3] == wanted[:3]
        assert found.figures.keys() == wanted.figures.keys()  # residuals of the rows that there are may be rounding
        assert found.figures["update_max"] == pytest.approx(wanted.figures["update_max"], rel=1e-3)


def test_an_expert_elsewhere_has_no_deviation_here(last_of_four):
    """NaN would become the mean that all processes log."""
    model = fully_shard(torch.nn.ParameterDict({"up": torch.nn.Parameter(torch.randn(3, 6, 4))}))
    optimizer = PartialMuon(model.named_parameters(), roles={"up": "mlp"}, rank=2)
    optimizer.observer = ResidualProbe()
    model["up"].grad = torch.zeros_like(model["up"])
    optimizer.step()
    (reading,) = optimizer.observer.read()
    assert not model["up"].to_local().numel() and "orthogonality" not in reading.figures


@pytest.mark.parametrize("second_moment", ["factored", "block"])
def test_collectives_come_in_one_order_by_either_path(interpreted, monkeypatch, last_of_four, second_moment):
    """Torch moves what other processes move by kernels; with a monitor, they would wait for each other forever."""
    met = []

    def list_calls(name):
        call = getattr(dist, name)

        def listed(*tensors, **options):
            met.append((name, [tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor)]))
            return call(*tensors, **options)

        monkeypatch.setattr(dist, name, listed)

    for name in {"all_reduce", "all_gather_into_tensor", "all_gather_single"} & set(dir(dist)):
        list_calls(name)
    trained(second_moment=second_moment, basis="shard")
    by_kernels = met.copy()
    met.clear()
    unknown = paths._unknown_layout
    monkeypatch.setattr(
        paths, "_unknown_layout", lambda parts, grads: paths._needs_reductions(parts) or unknown(parts, grads)
    )
    trained(second_moment=second_moment, basis="shard")
    assert met == by_kernels
