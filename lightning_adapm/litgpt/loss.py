"""Cross-entropy of an output layer's logits, of all at once or chunk by chunk to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def summed_loss(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Sum of the cross-entropies of all targets that are not ``ignored``."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=ignored, reduction="sum")


def chunked_loss(head: nn.Module, hidden: Tensor, targets: Tensor, ignored: int, size: int) -> Tensor:
    """The same from the inputs of an output layer, without ever holding all logits.

    A plain linear layer's gradient is summed up in place, chunk by chunk. Any other layer, such as one with LoRA's
    matrices, holds one chunk's gradients besides the sum.

    Args:
        head: Output layer.
        hidden: Its inputs, of shape (batch, positions, width).
        targets: Tokens, of shape (batch, positions).
        ignored: Target that does not count.
        size: Positions whose logits are computed together, and again in the backward pass.
    """
    if type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks:
        total: Tensor = _LinearLoss.apply(hidden, head.weight, head.bias, targets, ignored, size)
        return total

    def loss(chunk: Tensor, wanted: Tensor) -> Tensor:
        return summed_loss(head(chunk), wanted, ignored)

    chunks = zip(hidden.split(size, dim=1), targets.split(size, dim=1), strict=True)
    return torch.stack([checkpoint(loss, *each, use_reentrant=False) for each in chunks]).sum()


class _LinearLoss(torch.autograd.Function):
    """Loss of a linear layer's logits, whose backward pass computes the logits of each chunk again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int, size: int
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.ignored, ctx.size = ignored, size
        ctx.dtype = F.linear(hidden[:0, :, :0], weight[:, :0]).dtype  # autocast's, where that is on
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)  # the default may be bfloat16
        for _, logits, wanted in _chunks(ctx, hidden, weight, bias, targets):
            total += summed_loss(logits, wanted, ignored)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden, weight, bias, targets = ctx.saved_tensors
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(each) if needed else None
            for each, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        factor = weight.to(ctx.dtype)
        places = hidden.split(ctx.size, dim=1) if of_hidden is None else of_hidden.split(ctx.size, dim=1)
        for place, (chunk, logits, wanted) in zip(places, _chunks(ctx, hidden, factor, bias, targets), strict=True):
            by_logits = _gradient(logits, wanted, ctx.ignored, grad)
            if of_hidden is not None:
                place.copy_((by_logits @ factor).view_as(place))
            if of_weight is not None:
                _add_product(of_weight, by_logits.mT, chunk.flatten(0, 1))
            if of_bias is not None:
                of_bias += by_logits.sum(0, dtype=torch.float32)
        return of_hidden, of_weight, of_bias, None, None, None


def _chunks(
    ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, logits and targets of each chunk."""
    factor, shift = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
    for chunk, wanted in zip(hidden.split(ctx.size, dim=1), targets.split(ctx.size, dim=1), strict=True):
        inputs = chunk.to(ctx.dtype)
        yield inputs, F.linear(inputs, factor, shift), wanted


def _gradient(logits: Tensor, targets: Tensor, ignored: int, grad: Tensor) -> Tensor:
    """Gradient of ``grad`` times the loss by logits, of shape (positions, vocabulary)."""
    found = logits.flatten(0, 1).softmax(-1, dtype=torch.float32)
    wanted = targets.flatten()[:, None]
    counts = wanted != ignored
    found.scatter_add_(1, wanted.where(counts, 0), -counts.to(found.dtype))
    return found.mul_(counts * grad).to(logits.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a gradient in place; rounded once, where both have one dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
