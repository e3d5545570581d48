"""Second moments: elementwise (AdamW), block (Adam-mini), factored (Adafactor).

Each makes its state for a piece of a given shape and turns gradients into denominators
``sqrt(v) / sqrt(1 - beta2**t) + eps`` that broadcast against them. The state is never kept below float32: with
``beta2 = 0.999`` a bfloat16 average stops decaying. ``step`` counts from 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators, SecondMoment, State
from lightning_adapm.moments.batches import Stack
from lightning_adapm.moments.storage import EXACT, Entry, Storage
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction, Tensors, each

ADDED = 1e-30
"""Constant that AdaLomo adds to squares."""


@dataclass(frozen=True)
class ElementwiseSecondMoment(SecondMoment):
    """AdamW's: ``exp_avg_sq`` of the parameter's shape."""

    beta2: float
    eps: float
    storage: Storage = EXACT
    elementwise: ClassVar[bool] = True
    keys: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq"})

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        return {"exp_avg_sq": Entry(shape, rows=True, storage=self.storage)}

    @classmethod
    def fits(cls, saved: Mapping[str, Any], shape: torch.Size) -> bool:
        return bool(saved["exp_avg_sq"].shape == shape)

    @classmethod
    def dense(cls, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
        average: Tensor = saved["exp_avg_sq"]
        return average

    def from_dense(self, dense: Tensor, state: dict[str, Any]) -> None:
        self.storage.write([state], "exp_avg_sq", [dense])

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        averages = self.storage.read(states, "exp_avg_sq")
        torch._foreach_mul_(averages, self.beta2)
        torch._foreach_addcmul_(averages, grads, grads, 1 - self.beta2)
        self.storage.write(states, "exp_avg_sq", averages)
        return Denominators(list(torch._foreach_sqrt(averages)), bias_correction(self.beta2, step), self.eps)


@dataclass(frozen=True)
class BlockSecondMoment(SecondMoment):
    """Adam-mini's: the mean of the squared gradient over a block (arXiv 2406.16793, Algorithm 1).

    Args:
        blocks: Number of equal blocks of outputs (heads) per matrix, or None for one block per output. Tensors that are
            not matrices are one block.
        outputs: Dimension of the outputs: rows (-2), or columns (-1) of a transposed weight.
    """

    beta2: float
    eps: float
    blocks: int | None = None
    outputs: int = -2
    storage: Storage = EXACT
    keys: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq"})

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        rows = len(shape) >= 2 and self.outputs == -2 and self.blocks is None
        return {"exp_avg_sq": Entry(torch.Size(self._shape(shape)), rows=rows, storage=self.storage)}

    @classmethod
    def fits(cls, saved: Mapping[str, Any], shape: torch.Size) -> bool:
        found = saved["exp_avg_sq"].shape
        equal = len(found) == len(shape) and all(n % max(1, k) == 0 for n, k in zip(shape, found, strict=True))
        return equal or bool(found.numel() == 1)

    @classmethod
    def dense(cls, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
        average: Tensor = saved["exp_avg_sq"]
        for dim in (-2, -1) if average.dim() >= 2 else ():
            if average.shape[dim] not in (1, shape[dim]):
                average = average.repeat_interleave(shape[dim] // average.shape[dim], dim=dim)
        return average.reshape(()).expand(shape) if average.numel() == 1 else average.expand(shape)

    def from_dense(self, dense: Tensor, state: dict[str, Any]) -> None:
        self.storage.write([state], "exp_avg_sq", [_reduced(dense, self._shape(dense.shape))])

    def _shape(self, shape: torch.Size) -> tuple[int, ...]:
        if len(shape) < 2:
            return ()
        blocks = self.blocks or shape[self.outputs]
        return (*shape[:-2], blocks, 1) if self.outputs == -2 else (*shape[:-2], 1, blocks)

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        averages = averaged(self.storage, states, "exp_avg_sq", self._means(grads, reduction), self.beta2)
        roots = each(torch.sqrt, averages)
        if grads[0].dim() >= 2 and self.blocks is not None:
            if self.outputs == -2:
                roots = reduction.of_rows(roots, self.blocks, grads)
            else:
                columns = grads[0].shape[-1] // self.blocks
                roots = each(lambda root: root.repeat_interleave(columns, dim=-1), roots)
        return Denominators(list(roots), bias_correction(self.beta2, step), self.eps)

    def _means(self, grads: list[Tensor], reduction: Reduction) -> Tensors:
        if grads[0].dim() < 2:
            return mean_squares(grads, None, reduction)
        means = mean_squares(grads, -3 - self.outputs, reduction)
        if self.blocks is None:
            return means
        if self.outputs == -2:
            return reduction.block_means(means, self.blocks)
        return each(partial(block_means, blocks=self.blocks, dim=-1), means)


@dataclass(frozen=True)
class FactoredSecondMoment(SecondMoment):
    """Adafactor's: row means ``exp_avg_sq_row`` ``(m, 1)`` and column means ``exp_avg_sq_col`` ``(1, n)`` of the
    squared gradient, ``v = row col / mean(row)`` (arXiv 1804.04235, Algorithm 4, with AdamW's bias correction).
    """

    beta2: float
    eps: float
    storage: Storage = EXACT
    keys: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq_row", "exp_avg_sq_col"})

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        return _rows_and_columns(shape, self.storage)

    @classmethod
    def fits(cls, saved: Mapping[str, Any], shape: torch.Size) -> bool:
        *batch, m, n = shape if len(shape) >= 2 else (-1, -1)
        return saved["exp_avg_sq_row"].shape == (*batch, m, 1) and saved["exp_avg_sq_col"].shape == (*batch, 1, n)

    @classmethod
    def dense(cls, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
        row, column = saved["exp_avg_sq_row"], saved["exp_avg_sq_col"]
        dense: Tensor = row * column / row.mean(dim=-2, keepdim=True).clamp_min(torch.finfo(row.dtype).tiny)
        return dense

    def from_dense(self, dense: Tensor, state: dict[str, Any]) -> None:
        self.storage.write([state], "exp_avg_sq_row", [dense.mean(dim=-1, keepdim=True)])
        self.storage.write([state], "exp_avg_sq_col", [dense.mean(dim=-2, keepdim=True)])

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        rows, columns = (
            averaged(self.storage, states, key, mean_squares(grads, dim, reduction), self.beta2)
            for key, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2))
        )
        tiny = torch.finfo(rows[0].dtype).tiny
        shares = each(lambda row, mean: (row / mean.clamp_min(tiny)).sqrt_(), rows, reduction.means(rows))
        roots = each(torch.sqrt, columns)
        return Denominators(list(shares), bias_correction(self.beta2, step), self.eps, list(roots))


def _rows_and_columns(shape: torch.Size, storage: Storage) -> dict[str, Entry]:
    *batch, m, n = shape
    return {
        "exp_avg_sq_row": Entry(torch.Size((*batch, m, 1)), rows=True, storage=storage),
        "exp_avg_sq_col": Entry(torch.Size((*batch, 1, n)), storage=storage),
    }


def _reduced(dense: Tensor, shape: Sequence[int]) -> Tensor:
    """An elementwise second moment as means of equal blocks, in an array of ``shape``."""
    if len(shape) < 2 and dense.shape != torch.Size(shape):
        return dense.mean()
    for dim in (-2, -1) if len(shape) >= 2 else ():
        if shape[dim] != dense.shape[dim]:
            dense = block_means(dense, shape[dim], dim)
    return dense


def block_means(means: Tensor, blocks: int, dim: int) -> Tensor:
    """Means of ``blocks`` equal blocks along ``dim``, a negative dimension."""
    return means.unflatten(dim, (blocks, -1)).mean(dim=dim)


def mean_squares(grads: list[Tensor], dim: int | None, reduction: Reduction) -> Tensors:
    """Means of squares along ``dim``, kept as a dimension of one, or over everything, for gradients of one shape.

    They are bounded by :func:`largest`, because an infinite mean would stay forever.
    """
    if isinstance(grads, Stack):
        sums: Tensors = grads.squares(dim)
    elif dim is None:
        sums = list(torch._foreach_pow(torch._foreach_norm(grads), 2))
    else:
        sums = [torch.linalg.vector_norm(grad, dim=dim, keepdim=True).square_() for grad in grads]
    sums = reduction.rows(sums) if dim == -1 else reduction.total(sums)
    count = max(1, grads[0].shape[-1] if dim == -1 else reduction.sizes(grads)[0])
    return each(lambda total: (total / count).clamp_max_(largest(total.dtype)), sums)


def largest(dtype: torch.dtype) -> float:
    """Bound of mean squares, so that no average overflows."""
    return torch.finfo(dtype).max * 2.0**-30


def averaged(storage: Storage, states: Sequence[State], key: str, means: Tensors, beta2: float) -> Tensors:
    """Take means into the averages under a ``key``; return these, in one tensor where the means are."""
    kept = storage.read(states, key)
    averages = torch.stack(kept) if isinstance(means, Tensor) else kept
    # not lerp: an average that overflowed to infinity must not become NaN
    each(lambda average, mean: average.mul_(beta2).add_(mean, alpha=1 - beta2), averages, means)
    storage.write(states, key, list(averages))
    return averages


def bias_correction(beta2: float, step: int) -> float:
    """Divisor of the root of a second moment."""
    return float((1 - beta2**step) ** 0.5)


@dataclass(frozen=True)
class NoSecondMoment(SecondMoment):
    """The gradient is not divided by anything."""

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        return Denominators([grad.new_ones(()) for grad in grads], 1.0, 0.0)


@dataclass(frozen=True)
class RelativeSecondMoment(SecondMoment):
    """AdaLomo's: row and column means of the squared gradient, decaying by ``1 - step**-0.8``; elementwise for what is
    not a matrix.
    """

    storage: Storage = EXACT

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        if len(shape) < 2:
            return {"exp_avg_sq": Entry(shape, rows=True, storage=self.storage)}
        return _rows_and_columns(shape, self.storage)

    def weight(self, step: int) -> float:
        """Weight of this step's squares in the averages."""
        return float(step**-0.8)

    def from_dense(self, dense: Tensor, state: dict[str, Any]) -> None:
        for key in self.entries(dense.shape):
            (stored,) = self.storage.read([state], key)
            self.storage.write([state], key, [_reduced(dense, stored.shape)])

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        weight = self.weight(step)
        if grads[0].dim() < 2:
            averages = self.storage.read(states, "exp_avg_sq")
            torch._foreach_lerp_(averages, [_squares(grad) for grad in grads], weight)
            self.storage.write(states, "exp_avg_sq", averages)
            return Denominators(list(torch._foreach_sqrt(averages)), 1.0, 0.0)
        rows, columns = (self.storage.read(states, key) for key in ("exp_avg_sq_row", "exp_avg_sq_col"))
        for key, averages, dim in (("exp_avg_sq_row", rows, -1), ("exp_avg_sq_col", columns, -2)):
            means = each(lambda mean: mean + ADDED, mean_squares(grads, dim, reduction))
            torch._foreach_lerp_(averages, list(means), weight)
            self.storage.write(states, key, averages)
        shares = [(row / mean).sqrt_() for row, mean in zip(rows, reduction.means(rows), strict=True)]
        return Denominators(shares, 1.0, 0.0, list(torch._foreach_sqrt(columns)))


def _squares(grad: Tensor) -> Tensor:
    # bounded: infinity would stay in the average, and become NaN in the next
    return grad.square().add_(ADDED).clamp_max_(largest(grad.dtype))
