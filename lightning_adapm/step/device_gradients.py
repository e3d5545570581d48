"""Gradients on a device that kernels read where they lie."""

from functools import cached_property

import torch
from torch import Tensor

from lightning_adapm.moments.batches import Stack
from lightning_adapm.moments.second import FactoredSecondMoment, RelativeSecondMoment
from lightning_adapm.step import kernels, reading
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.reading import FAST, Arithmetic, Reading

_BY_COLUMNS = (FactoredSecondMoment, RelativeSecondMoment)
"""Second moments that take sums of squares of columns."""


class DeviceGradients(Stack):
    """Gradients in float32 or a smaller dtype that are multiplied without being copied.

    A gradient with an infinity or a NaN is zero in every product and sum.

    Args:
        grads: Gradients of one shape and memory layout.
        finite: Flags that processes which hold parts of them have agreed on.
        columns: Sums of squares of columns will be asked for.
    """

    def __init__(self, grads: list[Tensor], finite: Tensor | None, columns: bool = False) -> None:
        super().__init__(grads)
        self.matrices = Matrices.of(grads)  # not of this object: no circle may keep gradients alive
        self._agreed = None if finite is None else (~finite).to(torch.int32)
        self._columns = columns
        self._reading: Reading | None = None
        self.right: Tensor | None = None
        """Bases ``(b, r, n)`` before this step, if they were put together."""
        self.projected: Tensor | None = None
        """Products with these, or with those that a refresh begins with, if the first reading found them."""
        self.roots: Tensor | None = None
        """Roots ``(b, m)`` of second moments of blocks, if several processes hold rows of these."""
        self.basis: Tensor | None = None
        """Next basis ``(b, r, n)``, if this step refreshes it."""
        self.clock: Tensor | None = None
        """A :class:`~lightning_adapm.step.clock.Clock` on the device, which counts instead of numbers of the host."""

    @classmethod
    def of(cls, batch: Batch, finite: Tensor | None) -> "DeviceGradients":
        """Wrap the gradients of a batch, whose second moment determines what will be asked for."""
        return cls(batch.grads, finite, columns=isinstance(batch.parts[0].second, _BY_COLUMNS))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.matrices.addresses), *self.matrices.shape))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def reading(self) -> Reading:
        """Read the gradients unless that has been done."""
        return self._reading or self._read(None, 0)[1]

    def read_first(self, basis: Tensor | None) -> None:
        """Read the gradients, with their products with a ``basis`` ``(b, r, n)`` if there is one."""
        if basis is None:
            self._read(None, 0)
        else:
            self.projected = self.read(Matrices.of([basis.to(kernels.FACTOR).contiguous()]))

    def agree(self, flaws: Tensor, columns: Tensor | None = None) -> None:
        """Count as zero the gradients with ``flaws`` ``(gradients,)``, which processes have agreed on. Sums of squares
        of ``columns`` are over all of them, too.
        """
        self._agreed = flaws
        self._reading = self.reading._replace(flaws=flaws, columns=columns)

    def read(self, bases: Matrices, arithmetic: Arithmetic = FAST) -> Tensor:
        """Multiply the gradients by the transposed ``bases`` ``(r, n)``, to ``(b, m, width)``, finite or not."""
        product, _ = self._read(bases, bases.like.shape[-2], arithmetic)
        assert product is not None
        return product

    def _read(self, bases: Matrices | None, r: int, arithmetic: Arithmetic = FAST) -> tuple[Tensor | None, Reading]:
        known = self._reading
        product, found = reading.read(self.matrices, len(self), bases, r, known, self._columns, arithmetic)
        self._reading = found if self._agreed is None else found._replace(flaws=self._agreed)
        return product, self._reading

    @property
    def columns(self) -> Tensor:
        """Sums of squares of the columns, ``(b, n)``, finite or not."""
        sums = self.reading.columns
        if sums is None:  # not of the gradients as they were read
            _, again = reading.read(self.matrices, len(self), None, 0, None, columns=True)
            sums = again.columns
        assert sums is not None
        return sums

    @cached_property
    def _counting(self) -> Tensor:
        """Flags ``(b, 1)`` of the matrices with finite gradients."""
        each = len(self.matrices.addresses) // len(self)
        return (self.reading.flaws == 0)[:, None].expand(-1, each).reshape(-1, 1)

    def squares(self, dim: int | None) -> Tensor:
        sums = self.columns if dim == -2 else self.reading.squares
        sums, shape = torch.where(self._counting, sums, 0.0), list(self[0].shape)
        if dim is None:
            return sums.view(len(self), -1).sum(dim=1)
        shape[dim] = 1
        return sums.view(len(self), *shape)

    def any(self) -> Tensor:
        found = [grad.any(dim=-1).any(dim=-1).reshape(-1, 1, 1) for grad in self]
        return torch.cat(found) & self._counting[..., None]

    def __matmul__(self, columns: Tensor) -> Tensor:
        product = self.read(Matrices.of([columns.mT.to(kernels.FACTOR).contiguous()]))[..., : columns.shape[-1]]
        return self.without_flaws(product)

    def without_flaws(self, product: Tensor) -> Tensor:
        """Zero, in a product ``(b, m, width)``, what comes of gradients with a flaw."""
        return product.masked_fill_(~self._counting[..., None], 0.0)

    def __rmatmul__(self, weights: Tensor) -> Tensor:
        return reading.combine(self.matrices, weights.mT, self.reading.flaws)
