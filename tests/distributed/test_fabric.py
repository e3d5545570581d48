"""Fabric saves and loads under every strategy, with ``model.parameters()`` as litgpt passes them."""

import pytest
import torch
from launch import run_processes
from models import relative_difference
from test_equality import one_device


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp1", "fsdp2"])
def test_resumed_is_uninterrupted(strategy, tmp_path):
    run_processes("run_fabric.py", 2, tmp_path, strategy, "half.ckpt")
    run_processes("run_fabric.py", 4, tmp_path, strategy, "weights.pt", "half.ckpt")
    weights = torch.load(tmp_path / "weights.pt")
    for key, expected in one_device("gpt block").items():
        assert relative_difference(weights[key], expected) <= 1e-9, key
