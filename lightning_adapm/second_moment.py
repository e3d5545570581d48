"""Second moments: elementwise (AdamW), block (Adam-mini), factored (Adafactor).

Each makes its state for a piece of a given shape and turns gradients into denominators
``sqrt(v) / sqrt(1 - beta2**t) + eps`` that broadcast against them. The state is never kept below float32: with
``beta2 = 0.999`` a bfloat16 average stops decaying. ``step`` counts from 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_adapm.momentum import Stack, State
from lightning_adapm.sharding import ONE_PROCESS, Reduction


class Denominators(NamedTuple):
    """What to divide by: ``roots[i] / correction + eps``, which broadcasts against the gradients."""

    roots: list[Tensor]
    correction: float
    """Of the bias: ``sqrt(1 - beta2**t)``."""
    eps: float

    def settle(self, as_adamw: bool) -> tuple[list[Tensor], float]:
        """Divisors and what to multiply the quotients by; overwrites the roots.

        By AdamW's operations in AdamW's order, or with a pass less over the roots.
        """
        if not as_adamw:
            torch._foreach_add_(self.roots, self.eps * self.correction)
            return self.roots, self.correction
        torch._foreach_div_(self.roots, self.correction)
        torch._foreach_add_(self.roots, self.eps)
        return self.roots, 1.0


class SecondMoment(Protocol):
    """Two functions make a second moment."""

    elementwise: ClassVar[bool]
    """State and denominators have the gradients' shapes and need no other entry: they may be worked on in parts."""

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        """Zero state for a piece of ``shape``, on ``like``'s device and in ``like``'s dtype."""
        ...

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        """Take one gradient per piece into the states; the tensors given back are new.

        Shards are as for :meth:`lightning_adapm.momentum.Momentum.direction`.
        """
        ...


@dataclass(frozen=True)
class ElementwiseSecondMoment:
    """AdamW's: ``exp_avg_sq`` of the parameter's shape."""

    beta2: float
    eps: float
    elementwise: ClassVar[bool] = True

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        return {"exp_avg_sq": like.new_zeros(shape)}

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        averages = [state["exp_avg_sq"] for state in states]
        torch._foreach_mul_(averages, self.beta2)
        torch._foreach_addcmul_(averages, grads, grads, 1 - self.beta2)
        return Denominators(list(torch._foreach_sqrt(averages)), bias_correction(self.beta2, step), self.eps)


@dataclass(frozen=True)
class BlockSecondMoment:
    """Adam-mini's: the mean of the squared gradient over a block (arXiv 2406.16793, Algorithm 1).

    Args:
        blocks: blocks per matrix: a number of equal blocks of outputs (heads), or None for one block per output.
            Tensors that are not matrices are one block.
        outputs: the dimension that counts outputs: rows (-2), or columns (-1) of a transposed weight.
    """

    beta2: float
    eps: float
    blocks: int | None = None
    outputs: int = -2
    elementwise: ClassVar[bool] = False

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        return {"exp_avg_sq": like.new_zeros(self._shape(shape))}

    def _shape(self, shape: torch.Size) -> tuple[int, ...]:
        if len(shape) < 2:
            return ()
        blocks = self.blocks or shape[self.outputs]
        return (*shape[:-2], blocks, 1) if self.outputs == -2 else (*shape[:-2], 1, blocks)

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        averages = [state["exp_avg_sq"] for state in states]
        _average(averages, self._means(grads, reduction), self.beta2)
        roots: Sequence[Tensor] = torch._foreach_sqrt(averages)
        if grads[0].dim() >= 2 and self.blocks is not None:
            if self.outputs == -2:
                roots = reduction.of_rows(roots, self.blocks, grads)
            else:
                roots = [root.repeat_interleave(grads[0].shape[-1] // self.blocks, dim=-1) for root in roots]
        return Denominators(list(roots), bias_correction(self.beta2, step), self.eps)

    def _means(self, grads: list[Tensor], reduction: Reduction) -> list[Tensor]:
        if grads[0].dim() < 2:
            return mean_squares(grads, None, reduction)
        means = mean_squares(grads, -3 - self.outputs, reduction)
        if self.blocks is None:
            return means
        if self.outputs == -2:
            return reduction.block_means(means, self.blocks)
        return [block_means(mean, self.blocks, -1) for mean in means]


@dataclass(frozen=True)
class FactoredSecondMoment:
    """Adafactor's: row means ``exp_avg_sq_row`` ``(m, 1)`` and column means ``exp_avg_sq_col`` ``(1, n)`` of the
    squared gradient, ``v = row col / mean(row)`` (arXiv 1804.04235, Algorithm 4, with AdamW's bias correction).
    """

    beta2: float
    eps: float
    elementwise: ClassVar[bool] = False

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        *batch, m, n = shape
        return {"exp_avg_sq_row": like.new_zeros(*batch, m, 1), "exp_avg_sq_col": like.new_zeros(*batch, 1, n)}

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        rows, columns = ([state[key] for state in states] for key in ("exp_avg_sq_row", "exp_avg_sq_col"))
        _average(rows, mean_squares(grads, -1, reduction), self.beta2)
        _average(columns, mean_squares(grads, -2, reduction), self.beta2)
        tiny = torch.finfo(rows[0].dtype).tiny
        means = [mean.clamp_min(tiny) for mean in reduction.means(rows)]
        shares = [(row / mean).sqrt_() for row, mean in zip(rows, means, strict=True)]
        roots = [share * column.sqrt() for share, column in zip(shares, columns, strict=True)]
        return Denominators(roots, bias_correction(self.beta2, step), self.eps)


def block_means(means: Tensor, blocks: int, dim: int) -> Tensor:
    """Means of ``blocks`` equal blocks along ``dim``, a negative dimension."""
    return means.unflatten(dim, (blocks, -1)).mean(dim=dim)


def mean_squares(grads: list[Tensor], dim: int | None, reduction: Reduction) -> list[Tensor]:
    """Means of squares along ``dim``, kept as a dimension of one, or over everything.

    Bounded by :func:`largest`: an infinite block could never be divided by another.
    """
    if dim is not None and isinstance(grads, Stack):
        sums = grads.squares(dim)
    elif dim is None:
        sums = list(torch._foreach_pow(torch._foreach_norm(grads), 2))
    else:
        sums = [torch.linalg.vector_norm(grad, dim=dim, keepdim=True).square_() for grad in grads]
    sums = reduction.rows(sums) if dim == -1 else reduction.total(sums)
    counts = [grad.shape[-1] for grad in grads] if dim == -1 else reduction.sizes(grads)
    torch._foreach_div_(sums, [max(1, count) for count in counts])
    torch._foreach_clamp_max_(sums, largest(sums[0].dtype))
    return sums


def largest(dtype: torch.dtype) -> float:
    """Bound of mean squares: no average of them overflows, and none is infinite."""
    return torch.finfo(dtype).max * 2.0**-30


def _average(averages: list[Tensor], means: list[Tensor], beta2: float) -> None:
    torch._foreach_mul_(averages, beta2)  # not lerp: an average that overflowed to infinity must not become NaN
    torch._foreach_add_(averages, means, alpha=1 - beta2)


def bias_correction(beta2: float, step: int) -> float:
    """What the root of a second moment is divided by."""
    return float((1 - beta2**step) ** 0.5)
