"""Steps by :mod:`lightning_adapm.kernels`, which write nothing of a gradient's size but what they move.

A step reads gradients twice, once for what it has to know of them (are they finite, sums of squares of rows, products
with a basis) and once for moving the parameters. Where a basis is refreshed or processes hold parts of matrices,
momenta and second moments do what they do on every device with :class:`DeviceGradients`; else kernels do the same.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm import kernels
from lightning_adapm.kernels import Divisors, Matrices, Reading
from lightning_adapm.momentum import Direction, FullMomentum, LowRankMomentum, Momentum, NoMomentum, Stack, State, join
from lightning_adapm.optim.tasks import Task, reduction_of
from lightning_adapm.second_moment import (
    BlockSecondMoment,
    ElementwiseSecondMoment,
    SecondMoment,
    bias_correction,
)
from lightning_adapm.sharding import ONE_PROCESS, Reduction


def takes(tasks: list[Task], momentum: Momentum, second_moment: SecondMoment) -> bool:
    """Whether a step with these needs no more of gradients than kernels find."""
    multiplies = type(momentum) is NoMomentum or (type(momentum) is LowRankMomentum and momentum.debias)
    multiplies = multiplies or (type(momentum) is FullMomentum and tasks[0].shard is None)
    rows = type(second_moment) is BlockSecondMoment and second_moment.outputs == -2
    return (
        multiplies
        and (rows or type(second_moment) is ElementwiseSecondMoment)
        and kernels.movable([task.param for task in tasks], [task.grad for task in tasks])
    )


class DeviceGradients(Stack):
    """Gradients in float32 or less, as they are, that are multiplied without being copied.

    One with an infinity or a NaN is zero in every product and sum.

    Args:
        tasks: whose gradients.
        finite: flags that processes which hold parts of them have agreed on.
    """

    def __init__(self, tasks: list[Task], finite: Tensor | None) -> None:
        super().__init__([task.grad for task in tasks])
        self.matrices = Matrices.of(self)
        self._agreed = None if finite is None else (~finite).to(torch.int32)
        self._reading: Reading | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.matrices.addresses), *self[0].shape[-2:]))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def reading(self) -> Reading:
        """Read them, if they are not read yet."""
        return self._reading or self._read(None, 0)[1]

    def read(self, bases: Matrices) -> Tensor:
        """Their products with the transposed ``bases``, ``(b, m, width)``, whether they are finite or not."""
        product, _ = self._read(bases, bases.like.shape[-2])
        assert product is not None
        return product

    def _read(self, bases: Matrices | None, r: int) -> tuple[Tensor | None, Reading]:
        product, found = kernels.read(self.matrices, len(self), bases, r, self._reading)
        self._reading = found if self._agreed is None else found._replace(flaws=self._agreed)
        return product, self._reading

    @cached_property
    def _counting(self) -> Tensor:
        """Flags of the matrices that count, ``(b, 1)``."""
        each = len(self.matrices.addresses) // len(self)
        return (self.reading.flaws == 0)[:, None].expand(-1, each).reshape(-1, 1)

    def squares(self) -> list[Tensor]:
        squares = torch.where(self._counting, self.reading.squares, 0.0)
        return [part.view(*self[0].shape[:-1], 1) for part in squares.chunk(len(self))]

    def __matmul__(self, columns: Tensor) -> Tensor:
        product = self.read(Matrices.of([columns.mT.contiguous()]))[..., : columns.shape[-1]]
        return torch.where(self._counting[..., None], product, 0.0)

    def __rmatmul__(self, weights: Tensor) -> Tensor:
        return kernels.combine(self.matrices, weights, self.reading.flaws)

    def joined(self) -> Tensor:
        stack = torch.cat([grad.reshape(-1, *grad.shape[-2:]) for grad in self]).float()
        return torch.where(self._counting[..., None], stack, 0.0)


def step(
    tasks: list[Task],
    grads: DeviceGradients,
    momentum: Momentum,
    second_moment: SecondMoment,
    number: int,
    decay: float,
    group: Mapping[str, Any],
) -> bool:
    """Move the parameters of ``tasks``, which :func:`takes`, in their step ``number``; False where it is the general
    way that does it.
    """
    assert isinstance(momentum, NoMomentum | FullMomentum | LowRankMomentum)
    assert isinstance(second_moment, BlockSecondMoment | ElementwiseSecondMoment)
    states = [task.state for task in tasks]
    lefts = rights = projected = averages = blocks = left = roots = average = clip = None
    beta1, scale = 0.0, 1.0
    if reduction_of(tasks) is not ONE_PROCESS:
        return False
    if isinstance(momentum, LowRankMomentum):
        if momentum.due(number) or not all(state["seeded"] for state in states):
            return False
        lefts, beta1 = _matrices(states, "exp_avg_l"), momentum.beta1
        # read by every block of rows: half the bytes are worth a copy
        rights = Matrices.of([join([state["exp_avg_r"] for state in states]).to(kernels.FACTOR)])
        projected = grads.read(rights)
    if isinstance(momentum, FullMomentum):
        average, scale = (_matrices(states, "exp_avg"), momentum.beta1), 1 / (1 - momentum.beta1**number)
    elif group["clip_threshold"] is not None:
        clip = group["clip_threshold"] * momentum.clamp
    if isinstance(second_moment, BlockSecondMoment):
        averages, blocks = _matrices(states, "exp_avg_sq"), second_moment.blocks
    if lefts is not None or averages is not None:
        betas = beta1, second_moment.beta2
        left, roots = kernels.advance(
            grads.reading, projected, lefts, averages, grads.shape[1:], blocks, betas, 1 - beta1**number
        )
    kernels.move(
        [task.param for task in tasks],
        grads.matrices,
        grads.reading.flaws,
        average,
        None if left is None or rights is None else (left, rights),
        _divisors(second_moment, states, number, roots),
        scale,
        float(group["lr"]),
        decay,
        clip,
    )
    return True


def _matrices(states: Sequence[State], key: str) -> Matrices:
    return Matrices.of([state[key] for state in states])


def _divisors(
    second_moment: BlockSecondMoment | ElementwiseSecondMoment,
    states: Sequence[State],
    number: int,
    roots: Tensor | None,
) -> Divisors:
    """Of an elementwise second moment, the averages themselves, where ``roots`` of blocks are not known."""
    correction = bias_correction(second_moment.beta2, number)
    if roots is not None:
        return Divisors(roots, correction, second_moment.eps)
    return Divisors(_matrices(states, "exp_avg_sq"), correction, second_moment.eps, second_moment.beta2)


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
    """What :func:`lightning_adapm.optim.update.update` does, for layouts that are :func:`kernels.movable`."""
    states, used = [task.state for task in tasks], direction.tensors
    if isinstance(second_moment, ElementwiseSecondMoment) and used is grads:
        divisors = _divisors(second_moment, states, number, None)
    else:
        roots, correction, eps = second_moment.denominators(grads, states, number, reduction)
        roots = [
            root if root.dim() > 1 else root.expand(*grad.shape[:-2], 1, 1)
            for root, grad in zip(roots, used, strict=True)
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
