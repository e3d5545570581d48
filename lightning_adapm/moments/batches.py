"""Batches of matrices: lists of tensors of one shape that a step treats as one tensor, without a copy if possible."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import pad


class Stack(list[Tensor]):
    """Gradients of one shape that a step can multiply without copying them into one tensor."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """Shape ``(b, m, n)`` of all matrices together."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of products."""

    @abstractmethod
    def __matmul__(self, columns: Tensor) -> Tensor:
        """Multiply the gradients ``(b, m, n)`` by ``(b, n, r)`` from the right."""

    @abstractmethod
    def __rmatmul__(self, weights: Tensor) -> Tensor:
        """Multiply the gradients ``(b, m, n)`` by ``(b, r, m)`` from the left."""

    @abstractmethod
    def squares(self, dim: int | None) -> Tensor:
        """Sums of squares of the rows of all gradients, ``(gradients, ..., m, 1)``; with ``dim`` -2 of their columns,
        with None of each gradient. The tensor is new.
        """

    @abstractmethod
    def any(self) -> Tensor:
        """Whether each matrix has an entry that is not zero, ``(b, 1, 1)``."""


class Stacked(list[Tensor]):
    """Parts of one tensor along its first dimension, which :func:`join` need not copy."""

    def __init__(self, whole: Tensor) -> None:
        super().__init__(whole.unbind())
        self.whole = whole


def join(tensors: list[Tensor]) -> Tensor:
    """Join matrices and stacks of matrices of one shape to a batch ``(b, m, n)``; a single one and what is
    :class:`Stacked` are not copied.

    Where a process holds parts of them, rows of zero make the number of rows equal.
    """
    if isinstance(tensors, Stacked) and tensors.whole.dim() > 2:
        return tensors.whole.flatten(0, -3)
    if len(tensors) > 1 and tensors[0].dim() == 2 and all(t.shape == tensors[0].shape for t in tensors):
        return torch.stack(tensors)
    batches = [tensor if tensor.dim() == 3 else tensor.unsqueeze(0) for tensor in tensors]
    if len(batches) == 1:
        return batches[0]
    most = max(batch.shape[-2] for batch in batches)
    return torch.cat([pad(batch, (0, 0, 0, most - batch.shape[-2])) for batch in batches])


def split(batch: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Split a batch into views shaped as ``like``; the inverse of :func:`join`."""
    if all(tensor.shape == batch.shape[1:] for tensor in like):
        return list(batch.unbind())
    sizes = [tensor.shape[0] if tensor.dim() == 3 else 1 for tensor in like]
    parts = zip(batch.split(sizes), like, strict=True)
    return [part[:, : tensor.shape[-2]].view(tensor.shape) for part, tensor in parts]
