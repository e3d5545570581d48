"""Rows of matrices on several processes, as tensor parallelism shards them; other layouts are refused."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_adapm import AdaPM


@pytest.fixture
def last_of_two():
    """This process is the last of two; others have nothing to add to its sums."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def trained(mesh, whole):
    """Rows of a vocabulary after a few steps, whose gradients are whole on every process or sharded alike."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh, [Shard(0)]))
    optimizer = AdaPM([("embed_tokens.weight", weight)], rank=2)
    for _ in range(4):
        grad = torch.randn(8, 6, generator=generator)
        rows, placement = (grad, Replicate()) if whole else (grad[4:], Shard(0))
        weight.grad = DTensor.from_local(rows, mesh, [placement], run_check=False)
        optimizer.step()
    return weight.to_local().detach()


def test_gradients_that_are_whole_on_every_process(last_of_two):
    """As those of a sharded vocabulary: the first rows moved the last ones, too."""
    torch.testing.assert_close(trained(last_of_two, whole=True), trained(last_of_two, whole=False), rtol=0, atol=0)
