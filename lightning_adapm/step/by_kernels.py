"""Steps by :mod:`lightning_adapm.step.kernels`, which write nothing of a gradient's size except parameters and state.

A step reads gradients twice: once for flags of finite ones, sums of squares of rows and products with a basis, and once
to move the parameters. A refresh of a basis reads them twice more. Without a basis yet, or where processes hold parts
of matrices, momenta and second moments work on :class:`DeviceGradients` as on every device. Otherwise kernels do the
same.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.base import Direction, Stack, State, join, split
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum, NoMomentum
from lightning_adapm.moments.second import (
    BlockSecondMoment,
    ElementwiseSecondMoment,
    FactoredSecondMoment,
    bias_correction,
)
from lightning_adapm.step import kernels
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.kernels import Divisors, Reading
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.parts import Part

_TOGETHER_NUMEL = 1 << 24
"""Maximum number of elements of bases that are made orthonormal together, as copies in float64."""

Iterated = tuple[Tensor, Tensor, Tensor]
"""Arguments of :func:`lowrank.refreshed`."""


class DeviceGradients(Stack):
    """Gradients in float32 or a smaller dtype that are multiplied without being copied.

    A gradient with an infinity or a NaN is zero in every product and sum.

    Args:
        grads: Gradients of one shape and memory layout.
        finite: Flags that processes which hold parts of them have agreed on.
    """

    def __init__(self, grads: list[Tensor], finite: Tensor | None) -> None:
        super().__init__(grads)
        self.matrices = Matrices.of(self)
        self._agreed = None if finite is None else (~finite).to(torch.int32)
        self._reading: Reading | None = None
        self.basis: Tensor | None = None
        """Next basis ``(b, r, n)``, if this step refreshes it."""

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

    def read(self, bases: Matrices) -> Tensor:
        """Products of the gradients with the transposed ``bases``, ``(b, m, width)``, finite or not."""
        product, _ = self._read(bases, bases.like.shape[-2])
        assert product is not None
        return product

    def _read(self, bases: Matrices | None, r: int) -> tuple[Tensor | None, Reading]:
        product, found = kernels.read(self.matrices, len(self), bases, r, self._reading)
        self._reading = found if self._agreed is None else found._replace(flaws=self._agreed)
        return product, self._reading

    @cached_property
    def _counting(self) -> Tensor:
        """Flags ``(b, 1)`` of the matrices with finite gradients."""
        each = len(self.matrices.addresses) // len(self)
        return (self.reading.flaws == 0)[:, None].expand(-1, each).reshape(-1, 1)

    def squares(self, dim: int) -> list[Tensor]:
        sums = self.reading.squares if dim == -1 else kernels.columns(self.matrices)
        sums, shape = torch.where(self._counting, sums, 0.0), list(self[0].shape)
        shape[dim] = 1
        return [part.view(shape) for part in sums.chunk(len(self))]

    def __matmul__(self, columns: Tensor) -> Tensor:
        product = self.read(Matrices.of([columns.mT.to(kernels.FACTOR).contiguous()]))[..., : columns.shape[-1]]
        return torch.where(self._counting[..., None], product, 0.0)

    def __rmatmul__(self, weights: Tensor) -> Tensor:
        return kernels.combine(self.matrices, weights.mT, self.reading.flaws)

    def joined(self) -> Tensor:
        stack = torch.cat([grad.reshape(-1, *grad.shape[-2:]) for grad in self]).float()
        return torch.where(self._counting[..., None], stack, 0.0)


def _joined(parts: Sequence[Part], key: str) -> Tensor:
    """Entries as one ``(b, ...)`` batch in float32; a copy, but of a single one."""
    return join([part[key] for part in parts]).float()


def refresh(batches: Sequence[Batch]) -> None:
    """Find the next bases of batches that refresh them.

    Products are computed batch by batch. All bases are made orthonormal together, because the many small kernels in a
    row take as long for one batch as for all.
    """
    found: list[tuple[DeviceGradients, Iterated]] = []
    for batch in batches:
        grads, momentum = batch.grads, batch.parts[0].first
        if not batch.path.whole or not isinstance(momentum, LowRankMomentum) or not momentum.due(batch.step):
            continue
        assert isinstance(grads, DeviceGradients)
        if momentum.rank >= grads.shape[-1]:
            continue
        right = _joined(batch.parts, "exp_avg_r")
        iterated = lowrank.iterated_rows(grads, _joined(batch.parts, "exp_avg_l"), right, momentum.beta1)
        found.append((grads, (*iterated, right)))
        if sum(right.numel() for _, (_, _, right) in found) > _TOGETHER_NUMEL:
            _settle(found)
            found = []
    if found:
        _settle(found)


def _settle(found: Sequence[tuple[DeviceGradients, Iterated]]) -> None:
    for (grads, _), basis in zip(found, lowrank.refreshed([iterated for _, iterated in found]), strict=True):
        grads.basis = basis


def step(batch: Batch, group: Mapping[str, Any]) -> None:
    """Move the parameters of a batch that :func:`refresh` has seen, all by kernels."""
    part, states, number = batch.parts[0], batch.parts, batch.step
    momentum, second_moment, grads = part.first, part.second, batch.grads
    assert isinstance(grads, DeviceGradients)
    assert isinstance(momentum, NoMomentum | FullMomentum | LowRankMomentum)
    assert isinstance(second_moment, BlockSecondMoment | ElementwiseSecondMoment | FactoredSecondMoment)
    lefts = right = refreshed = projected = averages = blocks = left = roots = average = clip = None
    beta1, scale = 0.0, 1.0
    if isinstance(momentum, LowRankMomentum):
        lefts, beta1 = _matrices(states, "exp_avg_l"), momentum.beta1
        # read by every block of rows: half the bytes are worth a copy
        kept = join([state["exp_avg_r"] for state in states])
        right = read = kept.to(kernels.FACTOR)
        if grads.basis is not None:
            refreshed = _refreshed(states, kept.float(), grads.basis, momentum)
            read = grads.basis.to(kernels.FACTOR)
            right = torch.cat([read, right], dim=-2)
            momentum.storage.write(states, "exp_avg_r", split(grads.basis, [state["exp_avg_r"] for state in states]))
        projected = grads.read(Matrices.of([read]))
    if isinstance(momentum, FullMomentum):
        average, scale = (_matrices(states, "exp_avg"), momentum.beta1), 1 / (1 - momentum.beta1**number)
    elif group.get("clip_threshold") is not None:
        clip = group["clip_threshold"] * momentum.clamp
    if isinstance(second_moment, BlockSecondMoment):
        averages, blocks = _matrices(states, "exp_avg_sq"), second_moment.blocks
    if lefts is not None or averages is not None:
        betas = beta1, second_moment.beta2
        left, roots = kernels.advance(
            grads.reading, projected, lefts, refreshed, averages, grads.shape[1:], blocks, betas, 1 - beta1**number
        )
    if isinstance(second_moment, FactoredSecondMoment):
        divisors = _factored(second_moment, states, number, grads)
    elif roots is None:
        assert isinstance(second_moment, ElementwiseSecondMoment)
        divisors = _elementwise(second_moment, states, number)
    else:
        divisors = Divisors(roots, bias_correction(second_moment.beta2, number), second_moment.eps)
    kernels.move(
        batch.params,
        grads.matrices,
        grads.reading.flaws,
        average,
        None if left is None or right is None else (left, Matrices.of([right])),
        divisors,
        scale,
        float(group["lr"]),
        part.decay,
        clip,
    )


def _refreshed(states: Sequence[Part], right: Tensor, basis: Tensor, momentum: LowRankMomentum) -> kernels.Refreshed:
    """What a new ``basis`` in the place of ``right``, both ``(b, r, n)``, leaves of the left factors."""
    held = _joined(states, "exp_avg_l")
    if len(states) == 1:  # a view of the state, which is to change
        held = held.clone()
    return kernels.Refreshed(held, lowrank.move_left(held, right, basis), momentum.payout)


def _matrices(states: Sequence[State], key: str) -> Matrices:
    return Matrices.of([state[key] for state in states])


def _elementwise(second_moment: ElementwiseSecondMoment, states: Sequence[State], number: int) -> Divisors:
    """The averages themselves, which the kernel updates with the directions."""
    correction = bias_correction(second_moment.beta2, number)
    return Divisors(_matrices(states, "exp_avg_sq"), correction, second_moment.eps, second_moment.beta2)


def _factored(
    second_moment: FactoredSecondMoment, states: Sequence[State], number: int, grads: DeviceGradients
) -> Divisors:
    """With the gradients taken into the averages."""
    averages = _matrices(states, "exp_avg_sq_row"), _matrices(states, "exp_avg_sq_col")
    sums = kernels.columns(grads.matrices)
    shares, roots = kernels.factor(grads.reading, sums, averages, grads.shape[1:], second_moment.beta2)
    return Divisors(shares, bias_correction(second_moment.beta2, number), second_moment.eps, columns=roots)


def move(batch: Batch, direction: Direction, lr: float, clip: float | None) -> None:
    """Move parameters along a direction, in layouts that are :func:`kernels.movable`.

    The same as :func:`lightning_adapm.step.by_torch.step` after the direction is known.
    """
    states, grads, number, used = batch.parts, batch.grads, batch.step, direction.tensors
    second_moment = states[0].second
    if isinstance(second_moment, ElementwiseSecondMoment) and second_moment.storage.plain and used is grads:
        divisors = _elementwise(second_moment, states, number)
    else:
        roots, correction, eps = second_moment.denominators(grads, states, number, batch.reduction)
        roots = [
            root if root.dim() else root.expand(*grad.shape[:-2], 1, 1) for root, grad in zip(roots, used, strict=True)
        ]
        divisors = Divisors(Matrices.of(roots), correction, eps)
    factors = None
    if direction.factors is not None:
        left, right = direction.factors
        k = left.shape[-1]
        factors = pad(left, (0, kernels.padded(k) - k)).to(kernels.FACTOR), Matrices.of([right.contiguous()])
    kernels.move(
        batch.params,
        used.matrices if isinstance(used, DeviceGradients) else Matrices.of(used),
        used.reading.flaws if isinstance(used, DeviceGradients) else None,
        None,
        factors,
        divisors,
        direction.scale,
        lr,
        states[0].decay,
        clip,
    )
