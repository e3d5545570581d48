"""Loss of a large vocabulary: logits of a few thousand positions at a time, of which nothing is kept."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LARGE = 4096
"""Vocabularies of more tokens than this are large."""
POSITIONS = 8192
"""Positions whose logits exist together."""
IGNORED = -100
"""Target of a position that does not count."""

Slope = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Losses by position and their gradients with respect to the logits, from logits and targets."""


def losses_and_slopes(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy in float32; slopes in the dtype of the logits. Compiled, it is one pass over the logits.

    Both are zero where the target is :data:`IGNORED`.
    """
    exact = logits.float()
    level = exact.logsumexp(dim=-1, keepdim=True)
    wanted = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    counts = (targets != IGNORED)[:, None]
    slopes = ((exact - level).exp() - wanted.float()) * counts
    losses = (level - exact.gather(-1, targets[:, None].clamp_min(0))) * counts
    return losses.squeeze(-1), slopes.to(logits.dtype)


def mean_loss(hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, slope: Slope) -> Tensor:
    """Mean cross-entropy of the logits ``hidden @ head.T``, computed in ``dtype``.

    Args:
        hidden: Output of the last norm, ``(positions, width)``.
        head: Weight of the head, ``(vocabulary, width)``.
        targets: Token to predict at each position, or :data:`IGNORED`.
        slope: :func:`losses_and_slopes`, compiled or not.
    """
    if torch.is_grad_enabled():
        return _MeanLoss.apply(hidden, head, targets, dtype, slope)
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows, wanted in _parts(hidden, targets):
        logits = (rows.to(dtype) @ head.to(dtype).T).float()
        total += torch.nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
    return total / _number(targets)


def _number(targets: Tensor) -> Tensor:
    """Number of the positions that count."""
    return (targets != IGNORED).sum().clamp_min(1)


def _parts(hidden: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(hidden.split(POSITIONS), targets.split(POSITIONS), strict=True)


class _MeanLoss(torch.autograd.Function):
    """The gradients are computed with the loss: then no logits wait for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype, slope: Slope) -> Tensor:
        weight, of_head, of_hidden = head.to(dtype), torch.zeros_like(head), []
        total = hidden.new_zeros((), dtype=torch.float32)
        for part, wanted in _parts(hidden, targets):
            rows = part.to(dtype)
            losses, slopes = slope(rows @ weight.T, wanted)
            total += losses.sum()
            of_hidden.append(slopes @ weight)
            of_head += slopes.T @ rows
        number = _number(targets)
        ctx.save_for_backward(torch.cat(of_hidden), of_head, number)
        return total / number

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_hidden, of_head, number = ctx.saved_tensors
        share = grads[0] / number
        return of_hidden.to(of_head.dtype) * share, of_head * share, None, None, None
