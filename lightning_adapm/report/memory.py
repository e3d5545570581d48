"""Memory of a whole training step, planned by running it on the meta device, where tensors have no values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lightning_adapm.optim.in_backward import Waiting
from lightning_adapm.report.allocations import AllocationTracker
from lightning_adapm.report.shortened import Shortened

_IN_LOW_PRECISION = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.conv1d)


@dataclass(frozen=True)
class StepBytes:
    """Bytes at the moment of a training step when the most memory is held.

    Args:
        weights: Parameters and buffers.
        gradients: Gradients of parameters.
        state: State of the optimizer.
        activations: Tensors that the forward pass has made and the backward pass still needs.
        transients: Everything else: tensors of the backward pass, recomputed blocks, and the optimizer's step.
    """

    weights: int = 0
    gradients: int = 0
    state: int = 0
    activations: int = 0
    transients: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state + self.activations + self.transients


def step_bytes(
    model: nn.Module,
    loss: Callable[[], Tensor],
    state: int,
    transients: int = 0,
    waiting: Waiting | None = None,
    accumulating: bool = False,
    freed_late: bool = False,
    autocast: torch.dtype | None = None,
    blocks: nn.ModuleList | None = None,
) -> StepBytes:
    """Plan the memory of one training step on a GPU.

    Forward and backward run once on the meta device, and every tensor is counted as long as it is alive. Attention
    counts as the fused kernels keep it. What an operation allocates and frees inside itself is not seen.

    Args:
        model: Module on the meta device.
        loss: Computes the loss of a micro-batch.
        state: Bytes of optimizer state.
        transients: Bytes that the optimizer's step allocates and frees again, which may be updates in backward.
        waiting: Chooses the gradients that wait for each other where parameters move in backward; None elsewhere.
        accumulating: Whether gradients of an earlier micro-batch are there already.
        freed_late: Whether those of the last step stay until the forward pass is over, as under the Trainer.
        autocast: Dtype of products under mixed precision; None for that of the weights.
        blocks: Blocks of the model that pass one tensor on. Where they are alike, the first few run for all.
    """
    trained = [param for param in model.parameters() if param.requires_grad]
    for param in trained:
        param.grad = torch.empty_like(param) if accumulating or freed_late else None
    tracker = AllocationTracker()
    tracker.begin(
        {
            "weights": [*model.parameters(), *model.buffers()],
            "gradients": [param.grad for param in trained if param.grad is not None],
        }
    )
    with (
        _hooked(trained, partial(_complete, tracker, waiting, transients)),
        Shortened(blocks, tracker, waiting) as shortened,
        tracker.following(),
        _FusedAttention(),
        nullcontext() if autocast is None else _Autocast(autocast),
    ):
        with tracker.counting("activations"):
            values = [loss()]
        for param in trained if not accumulating else ():
            param.grad = None
        _run_backward(values.pop())
        _allocate(transients)
    peak = shortened.peak()
    return StepBytes(peak["weights"], peak["gradients"], state, peak["activations"], peak["transient"])


@contextmanager
def _hooked(params: Sequence[Tensor], hook: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the context, call a hook with each parameter whose gradient is complete; none has a gradient later."""
    handles = [param.register_post_accumulate_grad_hook(hook) for param in params]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for param in params:
            param.grad = None


def _run_backward(value: Tensor) -> None:
    # not value.backward(), which leaves the modes, so that blocks would be computed again without them
    engine: Any = torch.autograd.Variable._execution_engine
    ones = torch.ones_like(value)
    engine.run_backward((value,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def _complete(tracker: AllocationTracker, waiting: Waiting | None, transients: int, param: Tensor) -> None:
    """Hook that counts a gradient, and lets parameters move where that happens inside backward."""
    assert param.grad is not None
    tracker.claim(param.grad, "gradients")
    if waiting is not None and waiting.add(param):
        _allocate(transients)
        for each in waiting.take().params:
            each.grad = None


def _allocate(size: int) -> None:
    """Allocate bytes for a moment."""
    torch.empty(size, dtype=torch.uint8, device="meta")


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels keep it: without a matrix of scores, which the meta device would make."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        scale = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


class _Autocast(TorchFunctionMode):
    """Products in a lower precision, as ``torch.autocast`` has them on other devices than this one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _IN_LOW_PRECISION or func is F.scaled_dot_product_attention:
            args = tree_map(self._cast, args)
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any) -> Any:
        return value.to(self._dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
