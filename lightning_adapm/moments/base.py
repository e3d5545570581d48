"""Interfaces of first and second moments, and the batches of matrices that they work on."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction


class State(Protocol):
    """State of one piece: tensors, and numbers that the host must have without asking the device."""

    def __getitem__(self, key: str, /) -> Any: ...

    def __setitem__(self, key: str, value: Any, /) -> None: ...


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
    def squares(self, dim: int) -> list[Tensor]:
        """Sums of squares of the rows of every gradient, ``(..., m, 1)``; with ``dim`` -2, of its columns."""

    @abstractmethod
    def joined(self) -> Tensor:
        """Copy the gradients into one tensor ``(b, m, n)``."""


class Direction(NamedTuple):
    """Direction of a step: ``scale * tensors[i]``, of the gradients' shapes, plus the product of ``factors``."""

    tensors: list[Tensor]
    scale: float
    scratch: bool
    """Whether the tensors are temporaries, which may be overwritten."""
    clamp: float | None
    """Factor of the bound ``clip_threshold`` on entries, which may be far larger than AdamW's; None for no bound."""
    factors: tuple[Tensor, Tensor] | None = None
    """Factors ``(b, m, k)`` and ``(b, k, n)`` over all matrices; multiplied late, so that parts of them can be."""

    def part(self, first: int, last: int) -> "Direction":
        """Select ``first`` to ``last`` in the first dimension of a direction of one tensor."""
        (tensor,) = self.tensors
        factors = self.factors
        if factors is not None:
            left, right = factors
            stack = tensor.dim() == 3
            factors = (left[first:last], right[first:last]) if stack else (left[:, first:last], right)
        return self._replace(tensors=[tensor[first:last]], factors=factors)

    def multiplied(self) -> "Direction":
        """Multiply the factors and add them to the tensors."""
        if self.factors is None:
            return self
        used = split(torch.baddbmm(join(self.tensors), *self.factors), self.tensors)
        return self._replace(tensors=used, scratch=True, factors=None)


class Momentum(Protocol):
    """Interface of first moments."""

    name: ClassVar[str]
    """Name of the policy."""

    def due(self, step: int) -> bool:
        """Whether this step does the work of only some steps; all pieces of one call must agree."""
        ...

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        """Make zero state for a matrix of ``shape``, on ``like``'s device and in ``like``'s dtype."""
        ...

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        """Update the states with one gradient per matrix, and return the bias-corrected direction.

        Where processes hold some rows each, ``grads`` and ``states`` are those of this process, ``make`` had their
        shape, and ``reduction`` sums over all rows.
        """
        ...


class Denominators(NamedTuple):
    """Denominators of a step: ``roots[i] / correction + eps``, which broadcast against the gradients."""

    roots: list[Tensor]
    correction: float
    """Correction of the bias: ``sqrt(1 - beta2**t)``."""
    eps: float

    def settle(self, as_adamw: bool) -> tuple[list[Tensor], float]:
        """Divisors, and a factor for the quotients; overwrites the roots.

        The operations are AdamW's in AdamW's order, or save one pass over the roots.
        """
        if not as_adamw:
            torch._foreach_add_(self.roots, self.eps * self.correction)
            return self.roots, self.correction
        torch._foreach_div_(self.roots, self.correction)
        torch._foreach_add_(self.roots, self.eps)
        return self.roots, 1.0


class SecondMoment(Protocol):
    """Interface of second moments."""

    elementwise: ClassVar[bool]
    """Whether state and denominators are elementwise, so that a step may work on parts of them."""

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        """Make zero state for a piece of ``shape``, on ``like``'s device and in ``like``'s dtype."""
        ...

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        """Update the states with one gradient per piece, and return new denominators.

        Shards are treated as in :meth:`Momentum.direction`.
        """
        ...


def join(tensors: list[Tensor]) -> Tensor:
    """Join matrices and stacks of matrices of one shape to a batch ``(b, m, n)``; a single one is not copied.

    Where a process holds parts of them, rows of zero make the number of rows equal.
    """
    if isinstance(tensors, Stack):
        return tensors.joined()
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


def store(batch: Tensor, states: list[Tensor]) -> None:
    """Write a batch back into the tensors that were joined."""
    write(split(batch, states), states)


def write(values: list[Tensor], states: list[Tensor]) -> None:
    """Store values in the states' dtype, clamped to its range, because an infinity would stay forever."""
    top = torch.finfo(states[0].dtype).max
    if 2 * top < torch.finfo(values[0].dtype).max:
        values = [value.clamp(-top, top) for value in values]
    torch._foreach_copy_(states, values)
