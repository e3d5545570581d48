"""Gradients on a CPU, as moments and the step by torch's operations read them."""

import math
from functools import cached_property

import torch
from torch import Tensor

from lightning_adapm.moments.batches import Stack

_SQUARED_ROWS, _SQUARED_NUMEL = 64, 1 << 20
"""Maximum numbers of rows and of elements that are squared at a time for sums over columns."""


class Gradients(Stack):
    """Gradients of one shape that are multiplied one by one, so that nothing of their size is copied.

    Sums of squares of rows are computed once, for the second moment and for :attr:`finite`.
    """

    @property
    def shape(self) -> torch.Size:
        return torch.Size((sum(self._sizes), *self[0].shape[-2:]))

    @property
    def dtype(self) -> torch.dtype:
        return self[0].dtype

    @property
    def _sizes(self) -> list[int]:
        """Number of matrices in each."""
        return [len(grad) if grad.dim() == 3 else 1 for grad in self]

    @cached_property
    def _norms(self) -> Tensor:
        """Euclidean lengths of the rows of each gradient; of vectors and scalars one number."""
        if self[0].dim() < 2:
            return torch.stack(torch._foreach_norm(self))
        return torch.stack([torch.linalg.vector_norm(grad, dim=-1, keepdim=True) for grad in self])

    @property
    def finite(self) -> bool:
        """Whether all are seen to be finite; squares of large numbers may overflow, too."""
        return math.isfinite(float(self._norms.sum()))

    def squares(self, dim: int | None) -> Tensor:
        if dim == -2:
            return torch.stack([_squares_of_columns(grad) for grad in self])
        rows = self._norms.square()
        return rows if dim == -1 or rows.dim() == 1 else rows.flatten(1).sum(dim=1)

    def any(self) -> Tensor:
        return torch.cat([grad.any(dim=-1).any(dim=-1).reshape(-1, 1, 1) for grad in self])

    def __matmul__(self, columns: Tensor) -> Tensor:
        product = columns.new_empty(*self.shape[:2], columns.shape[-1])
        for into, grad, rows in zip(product.split(self._sizes), self, columns.mT.split(self._sizes), strict=True):
            # transposed, because the library multiplies a few long rows half again as fast as many short ones
            into.copy_((rows @ grad.mT).mT)
        return product

    def __rmatmul__(self, weights: Tensor) -> Tensor:
        parts = zip(weights.split(self._sizes), self, strict=True)
        return torch.cat([rows @ grad for rows, grad in parts])


def _squares_of_columns(grad: Tensor) -> Tensor:
    """Sums of squares of the columns of a matrix or of each of a stack.

    The library's norm of columns takes ten times as long.
    """
    if grad.dim() == 3:
        return torch.stack([_squares_of_columns(matrix) for matrix in grad])
    count = max(1, min(_SQUARED_ROWS, _SQUARED_NUMEL // max(1, grad.shape[1])))
    return torch.stack([rows.square().sum(dim=0, keepdim=True) for rows in grad.split(count)]).sum(dim=0)
