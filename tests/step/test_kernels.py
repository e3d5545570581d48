"""The kernels of a CUDA step, interpreted on a CPU: the same training as without them."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from commands import HELPERS
from models import relative_difference, tiny_gpt
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from lightning_adapm import AdaPM
from lightning_adapm.step import kernels

pytest.importorskip("triton", reason="the kernels are Triton's")


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels run on a CPU as well; gives back the names of those that were launched."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a CUDA device tests/test_gpu.py runs the kernels themselves")
    triton_kernels = importlib.import_module("lightning_adapm.step.triton_kernels")
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(kernels, "FACTOR", torch.float32)  # the interpreter cannot multiply bfloat16
    launched = []

    def counted(name):
        kernel = getattr(triton_kernels, name)

        class Counted:
            def __getitem__(self, grid):
                launched.append(name)
                return kernel[grid]

        return Counted()

    for name in ("read", "columns", "combine", "advance", "factor", "move"):
        monkeypatch.setattr(triton_kernels, name, counted(name))
    return launched


class Mixed(nn.Module):
    """Fused weights, whose queries, keys and values lie behind or beside each other; a stack of experts; odd sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = tiny_gpt(n_embd=30, n_head=2, n_layer=1)
        config = GPTNeoXConfig(
            vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=50
        )
        self.neox = GPTNeoXForCausalLM(config)
        self.experts = nn.Parameter(torch.randn(3, 17, 26) / 4)


def trained(dtype, steps=8, spoiled=(), **options):
    torch.manual_seed(0)
    model = Mixed().to(dtype)
    optimizer = AdaPM(model.named_parameters(), lr=1e-2, roles={"^experts$": "mlp"}, update_proj_gap=3, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for name, param in model.named_parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            if step in spoiled and name.endswith(("attn.qkv.weight", "query_key_value.weight")):
                param.grad[1, 2] = float("nan")
        optimizer.step()
    states = [v.float().flatten() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return torch.cat([p.detach().float().flatten() for p in model.parameters()]), torch.cat(states), optimizer


def test_bases_are_refreshed_in_groups_of_a_bounded_size(interpreted, monkeypatch):
    together = trained(torch.float32, rank=2)[0]
    monkeypatch.setattr("lightning_adapm.step.by_kernels._TOGETHER_NUMEL", 1)
    torch.testing.assert_close(trained(torch.float32, rank=2)[0], together)


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_as_without_kernels(interpreted, monkeypatch, second_moment, dtype, tolerance):
    """Also with a gradient that is not finite, and refreshes. The interpreter cuts bfloat16 off, a device rounds it."""
    options = {"second_moment": second_moment, "rank": 2, "spoiled": (5,)}
    weights, state, optimizer = trained(dtype, **options)
    used = {"read", "combine", "advance", "move"}
    assert set(interpreted) == (used | {"columns", "factor"} if second_moment == "factored" else used)
    interpreted.clear()
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, expected_state, reference = trained(dtype, **options)
    assert not interpreted
    assert relative_difference(weights, expected) < tolerance
    assert relative_difference(state, expected_state) < 2e-5
    assert optimizer.nonfinite_gradients() == reference.nonfinite_gradients() != {}


def test_tiles_fit_smaller_gpus():
    """Those of compute capability 8.6, 8.9 and 12.0 have 99 KiB of shared memory for a block; no GPU is needed."""
    command = [sys.executable, HELPERS / "compile_kernels.py", "86"]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=compiled, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout)
    assert len(shared) == 4 and all(0 < needed <= 99 * 1024 for needed in shared.values()), shared
