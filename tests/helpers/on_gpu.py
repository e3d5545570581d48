"""What tests on a CUDA device share."""

import pytest
import torch
from torch import nn

from lightning_adapm import AdaLomo, AdaPM, Lomo, LoRAPre, PartialMuon

NEEDED = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NEIGHBORS = {
    "PartialMuon": (PartialMuon, {"rank": 3, "update_proj_gap": 3, "state_dtype": None}),
    "Muon": (PartialMuon, {"momentum": "full"}),
    "AdaLomo": (AdaLomo, {"update_in_backward": False}),
    "Lomo": (Lomo, {"update_in_backward": False}),
    "LoRAPre": (LoRAPre, {"rank": 5}),
}


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 160, batch_first=True)
    blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return nn.ModuleDict({"embed": nn.Embedding(50, 64), "blocks": blocks, "lm_head": nn.Linear(64, 40)}).to(dtype)


def compact(params, **options):
    """AdaPM with low-rank momentum for nearly every role, in float32."""
    return AdaPM(params, **{"rank": 3, "momentum": "compact", "state_dtype": None} | options)


def gradients(net, step):
    """The same on every device: drawn on the CPU."""
    generator = torch.Generator().manual_seed(step)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param)


def step_without_waiting(optimizer, may_wait):
    """A step in which the host's waiting for the GPU is an error, except where it may."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
