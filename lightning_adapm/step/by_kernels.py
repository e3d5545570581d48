"""Steps by :mod:`lightning_adapm.step.kernels`, which write nothing of a gradient's size except parameters and state.

A step reads gradients twice: once for flags of finite ones, sums of squares of rows and products with a basis, and once
to move the parameters. A refresh of a basis reads them twice more. Without a basis yet, or where processes hold parts
of matrices, momenta and second moments work on :class:`DeviceGradients` as on every device. Otherwise kernels do the
same.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.base import Direction, Momentum, SecondMoment, Stack, State, join, store
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum, NoMomentum
from lightning_adapm.moments.second import (
    BlockSecondMoment,
    ElementwiseSecondMoment,
    FactoredSecondMoment,
    bias_correction,
)
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction
from lightning_adapm.step import kernels
from lightning_adapm.step.kernels import Divisors, Reading
from lightning_adapm.step.launch import DTYPES, Matrices
from lightning_adapm.step.parts import PieceState, Plan, Task, reduction_of

_TOGETHER_NUMEL = 1 << 24
"""Maximum number of elements of bases that are made orthonormal together, as copies in float64."""

Iterated = tuple[Tensor, Tensor, Tensor]
"""Arguments of :func:`lowrank.refreshed`."""


def takes(tasks: list[Task], momentum: Momentum, second_moment: SecondMoment) -> bool:
    """Whether kernels find everything that a step with these moments needs of gradients."""
    multiplies = type(momentum) is NoMomentum or (type(momentum) is LowRankMomentum and momentum.debias)
    multiplies = multiplies or (type(momentum) is FullMomentum and tasks[0].shard is None)
    rows = type(second_moment) is BlockSecondMoment and second_moment.outputs == -2
    return (
        multiplies
        and (tasks[0].grad.dim() > 1 or tasks[0].shard is None)
        and (rows or type(second_moment) in (ElementwiseSecondMoment, FactoredSecondMoment))
        and all(average.dtype in DTYPES for average in _averages(tasks[0].state))
        and kernels.movable([task.param for task in tasks], [task.grad for task in tasks])
    )


def _averages(state: PieceState) -> list[Tensor]:
    """Dtypes of a piece's first moment, which are an option."""
    found = (state.get(key) for key in ("exp_avg", "exp_avg_l", "exp_avg_r"))
    return [each for each in found if each is not None]


class DeviceGradients(Stack):
    """Gradients in float32 or a smaller dtype that are multiplied without being copied.

    A gradient with an infinity or a NaN is zero in every product and sum.

    Args:
        tasks: Tasks with the gradients.
        finite: Flags of finite gradients, agreed between the processes that hold parts of them.
    """

    def __init__(self, tasks: list[Task], finite: Tensor | None) -> None:
        super().__init__([task.grad for task in tasks])
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


class Batch(NamedTuple):
    """Pieces of one shape that step together, and their gradients where they are not copied."""

    tasks: list[Task]
    plan: Plan
    step: int
    grads: DeviceGradients | None

    @property
    def states(self) -> list[PieceState]:
        return [task.state for task in self.tasks]

    def joined(self, key: str) -> Tensor:
        """Join states to a batch ``(b, ...)`` in float32; a single one is not copied."""
        return join([state[key] for state in self.states]).float()

    @property
    def by_kernels(self) -> bool:
        """Whether :func:`step` does the whole step: nothing is sharded, and every piece has a basis."""
        if self.grads is None or reduction_of(self.tasks) is not ONE_PROCESS:
            return False
        return not isinstance(self.plan.momentum, LowRankMomentum) or all(state["seeded"] for state in self.states)


def refresh(batches: Sequence[Batch]) -> None:
    """Find the next bases of batches that refresh them.

    Products are computed batch by batch. All bases are made orthonormal together, because the many small kernels in a
    row take as long for one batch as for all.
    """
    found: list[tuple[DeviceGradients, Iterated]] = []
    for batch in batches:
        grads, momentum = batch.grads, batch.plan.momentum
        if grads is None or not isinstance(momentum, LowRankMomentum) or not momentum.due(batch.step):
            continue
        if momentum.rank >= grads.shape[-1] or not batch.by_kernels:
            continue
        right = batch.joined("exp_avg_r")
        iterated = lowrank.iterated_rows(grads, batch.joined("exp_avg_l"), right, momentum.beta1)
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
    """Move the parameters of a batch ``by_kernels`` after :func:`refresh`."""
    tasks, plan, number = batch.tasks, batch.plan, batch.step
    momentum, second_moment, decay = plan.momentum, plan.second_moment, plan.decay
    grads, states = batch.grads, batch.states
    assert grads is not None
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
            refreshed = _refreshed(batch, kept.float(), grads.basis, momentum)
            read = grads.basis.to(kernels.FACTOR)
            right = torch.cat([read, right], dim=-2)
            store(grads.basis, [state["exp_avg_r"] for state in states])
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
        divisors = _factored(second_moment, batch, grads)
    elif roots is None:
        assert isinstance(second_moment, ElementwiseSecondMoment)
        divisors = _elementwise(second_moment, states, number)
    else:
        divisors = Divisors(roots, bias_correction(second_moment.beta2, number), second_moment.eps)
    kernels.move(
        [task.param for task in tasks],
        grads.matrices,
        grads.reading.flaws,
        average,
        None if left is None or right is None else (left, Matrices.of([right])),
        divisors,
        scale,
        float(group["lr"]),
        decay,
        clip,
    )


def _refreshed(batch: Batch, right: Tensor, basis: Tensor, momentum: LowRankMomentum) -> kernels.Refreshed:
    """Left factors when a new ``basis`` replaces ``right``, both ``(b, r, n)``."""
    held = batch.joined("exp_avg_l")
    if len(batch.tasks) == 1:  # a view of the state, which is to change
        held = held.clone()
    return kernels.Refreshed(held, lowrank.move_left(held, right, basis), momentum.payout)


def _matrices(states: Sequence[State], key: str) -> Matrices:
    return Matrices.of([state[key] for state in states])


def _elementwise(second_moment: ElementwiseSecondMoment, states: Sequence[State], number: int) -> Divisors:
    """The averages themselves, which the kernel updates with the directions."""
    correction = bias_correction(second_moment.beta2, number)
    return Divisors(_matrices(states, "exp_avg_sq"), correction, second_moment.eps, second_moment.beta2)


def _factored(second_moment: FactoredSecondMoment, batch: Batch, grads: DeviceGradients) -> Divisors:
    """Denominators after updating the averages with the gradients."""
    averages = _matrices(batch.states, "exp_avg_sq_row"), _matrices(batch.states, "exp_avg_sq_col")
    sums = kernels.columns(grads.matrices)
    shares, roots = kernels.factor(grads.reading, sums, averages, grads.shape[1:], second_moment.beta2)
    return Divisors(shares, bias_correction(second_moment.beta2, batch.step), second_moment.eps, columns=roots)


def move(
    tasks: list[Task],
    grads: list[Tensor],
    direction: Direction,
    second_moment: SecondMoment,
    number: int,
    reduction: Reduction,
    lr: float,
    decay: float,
    clip: float | None,
) -> None:
    """Equivalent of :func:`lightning_adapm.step.by_torch.update` for layouts that are :func:`kernels.movable`."""
    states, used = [task.state for task in tasks], direction.tensors
    if isinstance(second_moment, ElementwiseSecondMoment) and used is grads:
        divisors = _elementwise(second_moment, states, number)
    else:
        roots, correction, eps = second_moment.denominators(grads, states, number, reduction)
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
        [task.param for task in tasks],
        used.matrices if isinstance(used, DeviceGradients) else Matrices.of(used),
        used.reading.flaws if isinstance(used, DeviceGradients) else None,
        None,
        factors,
        divisors,
        direction.scale,
        lr,
        decay,
        clip,
    )
