"""One training step of a decoder, whose memory can be tracked through forward, backward and the optimizer."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from benchmarks.costs.memory import AllocationTracker, state_bytes, tensors_in
from benchmarks.costs.models import materialize
from benchmarks.costs.peers import Peer, build
from benchmarks.studies.decoder import Shape
from benchmarks.studies.optimizers import Parameters

PARTS = ("parameters", "gradients", "activations", "state", "transient")
WARMUP = 2
"""Steps before the one that is measured: the first makes the state."""


@dataclass(frozen=True)
class Setting:
    """Setting of a step: ``batch`` windows of ``length`` tokens on a device, ``accumulate`` times; ``autocast`` has
    products in bfloat16.
    """

    device: str
    dtype: torch.dtype
    batch: int
    length: int
    svd_limit: float = math.inf
    autocast: bool = False
    accumulate: int = 1


def _claim(tracker: AllocationTracker, param: Tensor) -> None:
    """Make a hook. It must not hold the model, because the garbage collector sees no cycle through a hook."""
    assert param.grad is not None
    tracker.claim(param.grad, "gradients")


class Training:
    """A decoder on random tokens with an optimizer."""

    def __init__(self, shape: Shape, peer: Peer, setting: Setting) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.model = materialize(shape, setting.device, setting.dtype)
        self.optimizer: Optimizer = build(peer, Parameters.of(self.model), setting.svd_limit)
        self.in_backward = peer.in_backward
        self.tokens = torch.randint(shape.vocab, (setting.batch, setting.length + 1), device=setting.device)

    def forward(self) -> Tensor:
        with torch.autocast(self.setting.device, torch.bfloat16, enabled=self.setting.autocast):
            return F.cross_entropy(self.model(self.tokens[:, :-1]), self.tokens[:, 1:].flatten())

    def backward(self) -> Tensor:
        loss = self.forward()
        loss.backward()
        return loss.detach()

    def gradients(self) -> None:
        """A step without the optimizer's."""
        self.optimizer.zero_grad()
        for _ in range(self.setting.accumulate):
            self.backward()

    def step(self) -> None:
        if self.in_backward:
            self.optimizer.zero_grad()
            self.optimizer.step(self.backward)  # type: ignore[arg-type]
        else:
            self.gradients()
            self.optimizer.step()


class Followed(Training):
    """A training loop whose steps a tracker can follow."""

    def __init__(self, shape: Shape, peer: Peer, setting: Setting, checkpointing: bool) -> None:
        super().__init__(shape, peer, setting)
        self.tracker = AllocationTracker()
        if checkpointing:
            for block in self.model.blocks:
                block.forward = self._checkpointed(block.forward)
        for param in self.model.parameters():
            param.register_post_accumulate_grad_hook(partial(_claim, self.tracker))

    def _checkpointed(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(*inputs: Any) -> Tensor:
            with self.tracker.counting("activations"):  # also when backward computes it again
                return forward(*inputs)

        return partial(checkpoint, counted, use_reentrant=False, preserve_rng_state=False)

    def forward(self) -> Tensor:
        with self.tracker.counting("activations"):
            return super().forward()

    def _allocated(self) -> int:
        """Maximum number of bytes that the GPU's allocator has handed out at once in a step."""
        self.optimizer.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated()

    def measured(self, device: str) -> dict[str, int]:
        """Bytes of the parts at the peak of one step, and ``peak``, their sum."""
        allocated = self._allocated() if device == "cuda" else 0
        self.optimizer.zero_grad()
        state = list(tensors_in(list(self.optimizer.state.values())))
        self.tracker.begin({"parameters": self.model.parameters(), "state": state})
        with self.tracker.following():
            self.step()
        parts = {part: self.tracker.peak[part] for part in PARTS}
        total = allocated or self.tracker.peak.total()
        # what the allocator knows beyond the parts is inside of operations, such as workspaces of products
        parts["transient"] += total - self.tracker.peak.total()
        return parts | {"peak": total, "all_state": state_bytes(self.optimizer)}


def measure(shape: Shape, peer: Peer, setting: Setting, checkpointing: bool) -> dict[str, int]:
    """Bytes by part at the peak of a training step that is not the first."""
    free(setting.device)
    # on a CPU all steps are as the one that is followed: nothing is compiled
    with torch.compiler.set_stance("default" if setting.device == "cuda" else "force_eager"):
        training = Followed(shape, peer, setting, checkpointing)
        for _ in range(WARMUP):
            training.step()
        return training.measured(setting.device)


def free(device: str) -> None:
    """Free unreferenced memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
