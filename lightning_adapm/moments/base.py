"""Interfaces of first and second moments, and what they return."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from lightning_adapm.moments.batches import join, split
from lightning_adapm.moments.storage import Entry, State
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction

_Kind = TypeVar("_Kind", bound="Moment")


class Direction(NamedTuple):
    """Direction of a step: ``scale * tensors[i]``, of the gradients' shapes, plus the product of ``factors``."""

    tensors: list[Tensor]
    scale: float
    scratch: bool
    """Whether the tensors are temporaries, which may be overwritten."""
    clamp: float | None
    """Factor of the bound ``clip_threshold`` on entries, which may be far larger than AdamW's; None for no bound."""
    factors: tuple[Tensor, Tensor] | None = None
    """Factors ``(b, m, k)`` and ``(b, k, n)`` over all matrices; multiplied late, so that it can be done in parts."""

    def some(self, first: int, last: int) -> "Direction":
        """Select the tensors ``first`` to ``last``."""
        tensors, factors = self.tensors[first:last], self.factors
        if factors is not None:
            left, right = factors
            each, rows = len(left) // len(self.tensors), max(tensor.shape[-2] for tensor in tensors)
            factors = left[each * first : each * last, :rows], right[each * first : each * last]
        return self._replace(tensors=tensors, factors=factors)

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

    def divided(self, divisors: list[Tensor], factor: float) -> list[Tensor]:
        """Compute ``factor * (tensors + product of factors) / divisors``, as new tensors."""
        if all(divisor.shape[-1:].numel() == 1 for divisor in divisors):
            # a row has one divisor: the left factor is divided, which is smaller than the product
            weights = torch._foreach_reciprocal(divisors)
            torch._foreach_mul_(weights, factor)
            found = list(torch._foreach_mul(self.tensors, weights))
            if self.factors is None:
                return found
            left, right = self.factors
            of_rows = [weight.expand(*each.shape[:-1], 1) for weight, each in zip(weights, found, strict=True)]
            return split(join(found).baddbmm_(left * join(of_rows), right), found)
        if self.factors is not None:
            found = split(torch.baddbmm(join(self.tensors), *self.factors, beta=factor, alpha=factor), self.tensors)
        else:
            found = list(torch._foreach_mul(self.tensors, factor))
        torch._foreach_div_(found, divisors)
        return found


class Moment:
    """Memory of the gradients of one matrix, declared once.

    Allocation, byte counts, sharding, saving and loading follow from :meth:`entries`. Loading a state that another
    moment saved goes through a dense tensor of the matrix's shape: :meth:`dense` of the one, :meth:`from_dense` of the
    other. A moment without them is saved and loaded, but not converted.
    """

    keys: ClassVar[frozenset[str]] = frozenset()
    """Keys that identify a saved state as this moment's. Of several moments with the same keys, the first one defined
    is taken."""

    def entries(self, shape: torch.Size) -> dict[str, Entry]:
        """Declare the state of a matrix of ``shape``, of a stack of matrices, or of a tensor that is neither."""
        return {}

    def make(self, shape: torch.Size, like: Tensor, kept: tuple[int, int] | None = None) -> dict[str, Any]:
        """Zero state for a matrix of ``shape``, on ``like``'s device, for arithmetic in ``like``'s dtype.

        ``kept`` are the columns that this process keeps of entries whose columns processes share.
        """
        made: dict[str, Any] = {}
        for key, entry in self.entries(shape).items():
            made |= entry.make(key, like, kept)
        return made

    def numbers(self, state: Mapping[str, Any]) -> dict[str, int]:
        """Compute the numbers that belong to the values of a state, for processes that hold only some of its matrices.

        Raises:
            NotImplementedError: There are numbers, and the moment does not define this method.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps numbers; sharding it needs a method numbers(state)")

    @classmethod
    def fits(cls, saved: Mapping[str, Any], shape: torch.Size) -> bool:
        """Whether the values saved under :attr:`keys` can belong to a matrix of ``shape``."""
        return True

    @classmethod
    def dense(cls, saved: Mapping[str, Any], shape: torch.Size) -> Tensor:
        """Convert saved values of this moment to the tensor of ``shape`` that they represent.

        Raises:
            ValueError: They cannot be converted.
        """
        raise ValueError(f"the state of a {cls.__name__} cannot become that of another moment")

    def from_dense(self, dense: Tensor, state: dict[str, Any]) -> None:
        """Fill a new ``state`` from what another moment remembered.

        Raises:
            ValueError: This moment cannot be made from it.
        """
        raise ValueError(f"a {type(self).__name__} cannot be made from the state of another moment")

    def resized(self, saved: Mapping[str, Any], state: dict[str, Any]) -> bool:
        """Fill a new ``state`` from a saved one of other shapes if that needs no dense tensor; return whether so."""
        return False

    @classmethod
    def kinds(cls: type[_Kind]) -> Iterator[type[_Kind]]:
        """All moments that derive from this one, in the order of their definition."""
        for kind in cls.__subclasses__():
            yield kind
            yield from kind.kinds()


class Momentum(Moment):
    """A first moment: turns gradients into a direction."""

    name: ClassVar[str]
    """Name of its policy."""
    has_basis: ClassVar[bool] = False
    """Whether it averages projections of gradients on an orthonormal basis."""

    @property
    def share(self) -> float:
        """Weight of the average in the direction; the gradient has the rest, as with Nesterov's momentum."""
        return 1.0

    def basis(self, state: State) -> Tensor | None:
        """Return the basis ``(r, n)``, or the bases of a stack; None without one."""
        return None

    def due(self, step: int) -> bool:
        """Whether this step refreshes a basis. All pieces of one call agree in that."""
        return False

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        """Take one gradient per matrix into the states and return the bias-corrected direction.

        Where processes hold some rows each, ``grads`` and ``states`` are of this one's, and ``reduction`` sums over all
        rows.
        """
        raise NotImplementedError


class Denominators(NamedTuple):
    """Denominators of a step: ``roots[i] / correction + eps``, which broadcast against the gradients."""

    roots: list[Tensor]
    correction: float
    """Correction of the bias: ``sqrt(1 - beta2**t)``."""
    eps: float
    columns: list[Tensor] | None = None
    """Factors ``(1, n)`` of roots ``(m, 1)``; multiplied late, so that it can be done in parts."""
    squared: bool = False
    """Whether the square roots are still to be taken, which a kernel does itself."""

    def some(self, first: int, last: int) -> "Denominators":
        """Select those of the tensors ``first`` to ``last``."""
        return self._replace(roots=self.roots[first:last], columns=self.columns and self.columns[first:last])

    def part(self, first: int, last: int, like: Tensor) -> "Denominators":
        """Select ``first`` to ``last`` in the first dimension of those of one tensor ``like``."""
        roots = [_rows_of(root, first, last, like) for root in self.roots]
        columns = self.columns and [_rows_of(column, first, last, like) for column in self.columns]
        return self._replace(roots=roots, columns=columns)

    def multiplied(self) -> "Denominators":
        """Multiply the columns and the roots."""
        if self.columns is None:
            return self
        return self._replace(roots=list(torch._foreach_mul(self.roots, self.columns)), columns=None)

    def rows(self, index: int, which: int, span: slice) -> Tensor:
        """Compute the denominators of some rows of one of the matrices that the gradient with this ``index`` stacks."""
        root = _matrix_of(self.roots[index], which)
        root = root[span] if len(root) > 1 else root
        root = root.sqrt() if self.squared else root
        root = root if self.columns is None else root * _matrix_of(self.columns[index], which)
        return root / self.correction + self.eps

    def settle(self, as_adamw: bool) -> tuple[list[Tensor], float]:
        """Return divisors and a factor for the quotients; overwrites the roots.

        The operations are AdamW's in AdamW's order, or save one pass over the roots.
        """
        roots = self.multiplied().roots
        if not as_adamw:
            torch._foreach_add_(roots, self.eps * self.correction)
            return roots, self.correction
        torch._foreach_div_(roots, self.correction)
        torch._foreach_add_(roots, self.eps)
        return roots, 1.0


def _rows_of(tensor: Tensor, first: int, last: int, like: Tensor) -> Tensor:
    each = tensor.dim() == like.dim() and len(tensor) == len(like)
    return tensor[first:last] if each else tensor.clone()


def _matrix_of(tensor: Tensor, which: int) -> Tensor:
    """One of the matrices that a tensor stacks, or its only one; a vector is a row."""
    if tensor.dim() == 3:
        return tensor[which if len(tensor) > 1 else 0]
    return tensor if tensor.dim() == 2 else tensor.reshape(1, -1)


class SecondMoment(Moment):
    """A second moment: turns gradients into denominators."""

    whole_matrices: ClassVar[bool] = False
    """Whether each matrix needs one process that has all of it; directions are then :meth:`applied`."""
    elementwise: ClassVar[bool] = False
    """Whether each entry of state and denominators depends on its own gradient alone, so that parts can be computed."""

    def denominators(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Denominators:
        """Take one gradient per piece into the states; the tensors returned are new.

        Shards are as for :meth:`Momentum.direction`.
        """
        raise NotImplementedError

    def applied(self, direction: Direction, reduction: Reduction = ONE_PROCESS) -> Direction:
        """Transform the matrices of a direction, for moments that need :attr:`whole_matrices`."""
        raise NotImplementedError
