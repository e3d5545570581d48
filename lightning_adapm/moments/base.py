"""Interfaces of first and second moments, and the batches of matrices that they work on."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction


class State(Protocol):
    """Of one piece: tensors, and numbers that the host must know without asking the device."""

    def __getitem__(self, key: str, /) -> Any: ...

    def __setitem__(self, key: str, value: Any, /) -> None: ...


class Stack(list[Tensor]):
    """Gradients of one shape that a step can multiply without copying them into one tensor."""

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """``(b, m, n)``, over all matrices."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of products."""

    @abstractmethod
    def __matmul__(self, columns: Tensor) -> Tensor:
        """``(b, m, n)`` times ``(b, n, r)``."""

    @abstractmethod
    def __rmatmul__(self, weights: Tensor) -> Tensor:
        """``(b, r, m)`` times ``(b, m, n)``."""

    @abstractmethod
    def squares(self, dim: int) -> list[Tensor]:
        """Sums of squares of the rows of every gradient, ``(..., m, 1)``, or with ``dim`` -2 of its columns."""

    @abstractmethod
    def joined(self) -> Tensor:
        """A copy ``(b, m, n)``."""


class Direction(NamedTuple):
    """What to move along: ``scale * tensors[i]``, of the gradients' shapes, with the product of ``factors`` added."""

    tensors: list[Tensor]
    scale: float
    scratch: bool
    """The tensors are temporaries, free to be overwritten."""
    clamp: float | None
    """Entries may be far larger than AdamW's, so ``clip_threshold`` times this bounds them; None: they may not."""
    factors: tuple[Tensor, Tensor] | None = None
    """``(b, m, k)`` and ``(b, k, n)`` over all matrices of the tensors; multiplied late, so that it can be in parts."""

    def part(self, first: int, last: int) -> "Direction":
        """Of a single tensor, what is at ``first`` to ``last`` in its first dimension."""
        (tensor,) = self.tensors
        factors = self.factors
        if factors is not None:
            left, right = factors
            stack = tensor.dim() == 3
            factors = (left[first:last], right[first:last]) if stack else (left[:, first:last], right)
        return self._replace(tensors=[tensor[first:last]], factors=factors)

    def multiplied(self) -> "Direction":
        """The same without factors."""
        if self.factors is None:
            return self
        used = split(torch.baddbmm(join(self.tensors), *self.factors), self.tensors)
        return self._replace(tensors=used, scratch=True, factors=None)


class Momentum(Protocol):
    """Two functions make a momentum, and one says which pieces can go through a step together."""

    name: ClassVar[str]
    """Of the policy."""

    def due(self, step: int) -> bool:
        """Whether this step does what only some steps do; the pieces of one call agree in it."""
        ...

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        """Zero state for a matrix of ``shape``, on ``like``'s device and in ``like``'s dtype."""
        ...

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        """Take one gradient per matrix into the states and give back the bias-corrected direction.

        Where processes hold some rows each, ``grads`` and ``states`` are of this one's, ``make`` had their shape, and
        ``reduction`` sums over all rows.
        """
        ...


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

        Shards are as for :meth:`lightning_adapm.moments.first.Momentum.direction`.
        """
        ...


def join(tensors: list[Tensor]) -> Tensor:
    """Matrices and stacks of matrices as one ``(b, m, n)`` batch; no copy when there is only one.

    They have one shape, but where a process holds parts of them: then rows of zero make the number of rows the same.
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
    """The inverse of :func:`join`: views of ``batch``, shaped as ``like``."""
    if all(tensor.shape == batch.shape[1:] for tensor in like):
        return list(batch.unbind())
    sizes = [tensor.shape[0] if tensor.dim() == 3 else 1 for tensor in like]
    parts = zip(batch.split(sizes), like, strict=True)
    return [part[:, : tensor.shape[-2]].view(tensor.shape) for part, tensor in parts]


def store(batch: Tensor, states: list[Tensor]) -> None:
    """Write a batch back into the tensors it was joined from."""
    write(split(batch, states), states)


def write(values: list[Tensor], states: list[Tensor]) -> None:
    """Store values in the states' dtype; beyond its range its largest number, for an infinity would stay forever."""
    top = torch.finfo(states[0].dtype).max
    if 2 * top < torch.finfo(values[0].dtype).max:
        values = [value.clamp(-top, top) for value in values]
    torch._foreach_copy_(states, values)
