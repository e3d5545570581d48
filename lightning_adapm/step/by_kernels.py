"""Steps by :mod:`lightning_adapm.step.kernels`, which write nothing of a gradient's size except parameters and state.

A step reads gradients twice: once for flags of finite ones, sums of squares and products with a basis, and once to move
the parameters. One pass cannot do both: a value that is not finite anywhere keeps all rows of a parameter from the
gradient. A refresh of a basis reads them twice more. Where processes hold rows of matrices, kernels work on these,
between which :mod:`lightning_adapm.step.exchange` puts together what they found. Without a basis yet, or for sums of
other kinds, momenta and second moments work on :class:`~lightning_adapm.step.device_gradients.DeviceGradients` as on
every device, but for full momentum, which is elementwise.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.moments.base import Direction, Momentum, State
from lightning_adapm.moments.batches import join, split
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum, NoMomentum
from lightning_adapm.moments.orthogonal import Orthogonal
from lightning_adapm.moments.quantized import CODES, SCALE, EightBits
from lightning_adapm.moments.regression import LowRankRegression
from lightning_adapm.moments.second import BlockSecondMoment, RelativeSecondMoment
from lightning_adapm.sharding.collectives import Planned
from lightning_adapm.step import kernels, moves, orthogonal, regression, relative, watching
from lightning_adapm.step.averages import Refreshed, advance
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.device_gradients import DeviceGradients
from lightning_adapm.step.divisors import by_part, found_by_torch, matrices_of, read_by_kernels
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.moves import Average, Divisors
from lightning_adapm.step.newton_schulz import is_half
from lightning_adapm.step.orthogonal import Scaled
from lightning_adapm.step.refreshing import moved_lefts
from lightning_adapm.step.rounding import rounding_of
from lightning_adapm.step.watching import Observer


def step(batch: Batch, group: Mapping[str, Any], observer: Observer | None) -> Iterable[Sequence[Planned]]:
    """Move the parameters of a batch that :func:`refresh` has seen, all by kernels.

    Returns:
        The rest of it, which yields the collectives that it has to wait for.
    """
    momentum, second_moment, grads = batch.parts[0].first, batch.parts[0].second, batch.grads
    assert isinstance(grads, DeviceGradients)
    if isinstance(second_moment, RelativeSecondMoment):
        relative.step(batch, grads, group)
        return ()
    if isinstance(momentum, LowRankRegression):
        direction, divisors = regression.step(batch, grads)
        _move(batch, direction, direction, divisors, group, None, observer)
        return ()
    lengths = None
    if isinstance(second_moment, Orthogonal) and isinstance(momentum, LowRankMomentum):
        lengths = torch.empty(grads.shape[:2], dtype=torch.float32, device=grads[0].device)
    factors, roots = _advanced(batch, grads, lengths)
    direction = _along(momentum, grads, batch.step)._replace(factors=factors)
    if isinstance(second_moment, Orthogonal):
        return _step_orthogonally(batch, direction, momentum.share, group, observer, lengths)
    clip = None
    if isinstance(momentum, NoMomentum | LowRankMomentum) and group.get("clip_threshold") is not None:
        clip = group["clip_threshold"] * momentum.clamp
    _move(batch, direction, direction, read_by_kernels(batch, grads, roots), group, clip, observer)
    return ()


def _advanced(
    batch: Batch, grads: DeviceGradients, lengths: Tensor | None
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Take gradients into factors of momentum and into averages by block, in one pass.

    Sums of squares of the rows of the left factor are written to ``lengths`` ``(b, m)``.

    Returns:
        Factors of the direction, and roots ``(b, m)`` of the averages; None without these.
    """
    first, second, states = batch.parts[0].first, batch.parts[0].second, batch.parts
    held: list[Tensor] = []
    lefts = right = refreshed = projected = averages = blocks = None
    beta1 = beta2 = 0.0
    if isinstance(first, LowRankMomentum):
        held, beta1 = first.storage.read(states, "exp_avg_l"), first.beta1
        lefts = Matrices.of(held)
        right, refreshed, projected = _projected(batch, grads, first, lefts)
    if isinstance(second, BlockSecondMoment) and grads.roots is None:
        averages, blocks, beta2 = matrices_of(states, "exp_avg_sq"), second.blocks, second.beta2
    if lefts is None and averages is None:
        return None, grads.roots
    left, roots = advance(
        grads.reading,
        projected,
        lefts,
        refreshed,
        averages,
        grads.shape[1:],
        blocks,
        (beta1, beta2),
        1 - beta1**batch.step,
        grads.clock,
        lengths,
    )
    if isinstance(first, LowRankMomentum):
        first.storage.write(states, "exp_avg_l", held)
    factors = None if left is None or right is None else (left, right)
    return factors, grads.roots if averages is None else roots


def _projected(
    batch: Batch, grads: DeviceGradients, momentum: LowRankMomentum, lefts: Matrices
) -> tuple[Tensor, Refreshed | None, Tensor]:
    """Project gradients on this step's bases, which are stored if they are new.

    Returns:
        Right factors of the direction, left factors in new bases, if there are any, and the products.
    """
    # read by every block of rows: half the bytes are worth a copy
    kept = join(momentum.bases(batch.parts)) if grads.right is None else grads.right
    right = basis = kept.to(kernels.FACTOR)
    refreshed = None
    if grads.basis is not None:
        fresh, grads.basis = grads.basis, None  # those of other batches wait for their turn
        basis = fresh.to(kernels.FACTOR)
        refreshed = Refreshed(moved_lefts(lefts, right, basis, grads.reading), momentum.payout)
        right = torch.cat([basis, right], dim=-2)
        bases = split(batch.reduction.kept_columns(fresh), momentum.bases(batch.parts))
        momentum.storage.of_bases.write(batch.parts, "exp_avg_r", bases)
        del fresh, bases
    projected = grads.read(Matrices.of([basis])) if grads.projected is None else grads.projected
    return right, refreshed, projected


def step_with_reductions(
    batch: Batch, group: Mapping[str, Any], observer: Observer | None
) -> Iterable[Sequence[Planned]]:
    """:func:`step` of a batch whose moments need more than kernels do: sums over processes, or first bases."""
    momentum, grads = batch.parts[0].first, batch.grads
    assert isinstance(grads, DeviceGradients)
    if isinstance(momentum, FullMomentum):
        direction = _along(momentum, grads, batch.step)
    else:
        direction = momentum.direction(grads, batch.parts, batch.step, batch.reduction)
    if batch.parts[0].second.whole_matrices:
        if direction.factors is not None:  # which have the share of the momentum
            direction = direction._replace(factors=_padded(*direction.factors))
        share = momentum.share if isinstance(momentum, FullMomentum) else 1.0
        return _step_orthogonally(batch, direction, share, group, observer)
    clip = group.get("clip_threshold")
    clip = None if clip is None or direction.clamp is None else clip * direction.clamp
    move(batch, direction, direction, group, clip, observer)
    return ()


def _step_orthogonally(
    batch: Batch,
    direction: Direction,
    share: float,
    group: Mapping[str, Any],
    observer: Observer | None,
    lengths: Tensor | None = None,
) -> Iterable[Sequence[Planned]]:
    """Write the direction, and return the rest of the step.

    ``share`` is that of the momentum in the direction: of the factors, or of a full average, which is taken further.
    ``lengths`` ``(b, m)`` are sums of squares of the rows of the left factor.
    """
    first, second, grads = batch.parts[0].first, batch.parts[0].second, batch.grads
    assert isinstance(grads, DeviceGradients) and isinstance(second, Orthogonal)
    average, factors = _average(first, batch.parts) if isinstance(first, FullMomentum) else None, None
    if direction.factors is not None:
        left, right = direction.factors
        factors = left, Matrices.of([right])
    sizes: Tensor | Scaled
    bounded = average is None and (factors is None or lengths is not None) and batch.parts[0].shard is None
    if bounded and is_half(grads.shape, kernels.FACTOR, second.iteration):
        found, sizes = orthogonal.direct_in_half(grads.matrices, grads.reading, factors, lengths, share)
    else:
        found, sizes = orthogonal.direct(grads.matrices, grads.reading.flaws, average, factors, share)
    shown = None
    if observer is not None:
        shown = Direction(split(orthogonal.unscaled(found, sizes), grads), 1.0, scratch=False, clamp=None)
    updates = orthogonal.updates(found, sizes, second.iteration, grads, batch.reduction)
    return _rest(batch, shown, updates, group, observer)


def _rest(
    batch: Batch,
    shown: Direction | None,
    updates: Generator[Sequence[Planned], None, Direction],
    group: Mapping[str, Any],
    observer: Observer | None,
) -> Iterable[Sequence[Planned]]:
    """Move parameters by updates, once they are found. Only an observer needs the direction that is ``shown``."""
    direction = yield from updates
    move(batch, direction if shown is None else shown, direction, group, None, observer)


def applied(batch: Batch, direction: Direction) -> Direction | None:
    """The update along a direction that torch's operations have found, if kernels orthogonalize whole matrices."""
    second = batch.parts[0].second
    if type(second) is not Orthogonal or not batch.path.moved_by_kernels or batch.parts[0].shard is not None:
        return None
    used = direction.multiplied().tensors
    found = torch.cat([each.to(kernels.FACTOR).reshape(-1, *each.shape[-2:]) for each in used])
    squares = torch.linalg.vector_norm(found, dim=(-2, -1), dtype=torch.float64).square_()
    return orthogonal.updates_of_whole(found, squares, second.iteration, used)


def _padded(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as kernels read them."""
    k = left.shape[-1]
    return pad(left.to(kernels.FACTOR), (0, kernels.padded(k) - k)), right.contiguous()


def _along(momentum: Momentum, grads: list[Tensor], number: int) -> Direction:
    """The direction without factors; a full average is taken further where it is used."""
    if isinstance(momentum, FullMomentum):
        return Direction(grads, 1 / (1 - momentum.beta1**number), scratch=False, clamp=None)
    return Direction(grads, 1.0, scratch=False, clamp=None)


def _average(momentum: FullMomentum, states: Sequence[State]) -> Average:
    """The averages as they are stored: the kernel takes the direction into them."""
    if isinstance(momentum.storage, EightBits):
        scales = matrices_of(states, "exp_avg" + SCALE)
        return Average(matrices_of(states, "exp_avg" + CODES), momentum.beta1, scales)
    return Average(matrices_of(states, "exp_avg"), momentum.beta1)


def _taken(momentum: FullMomentum, states: Sequence[State], grads: DeviceGradients) -> list[Tensor]:
    """The averages as they move parameters: those in place, or copies of what a kernel is about to store as codes.

    Small entries differ from their codes by far more than an update should seem to.
    """
    averages = momentum.storage.read(states, "exp_avg")
    if momentum.storage.plain:
        return averages
    finite = [torch.where(flaw == 0, grad.float(), 0.0) for grad, flaw in zip(grads, grads.reading.flaws, strict=True)]
    return list(torch._foreach_lerp(averages, finite, 1 - momentum.beta1))


def move(
    batch: Batch,
    momentum: Direction,
    direction: Direction,
    group: Mapping[str, Any],
    clip: float | None,
    observer: Observer | None,
) -> None:
    """Move parameters along a direction that torch's operations have found, or moments of :class:`DeviceGradients`.

    ``momentum`` is the direction before the second moment has changed it.
    """
    used = direction.tensors
    divisors = found_by_torch(batch, used)
    moved = direction
    if direction.factors is not None:
        moved = moved._replace(factors=_padded(*direction.factors))
    if not isinstance(used, DeviceGradients):
        moved = moved._replace(tensors=[tensor.contiguous() for tensor in used])
    _move(batch, moved if momentum is direction else momentum, moved, divisors, group, clip, observer)


def _move(
    batch: Batch,
    momentum: Direction,
    direction: Direction,
    divisors: Divisors,
    group: Mapping[str, Any],
    clip: float | None,
    observer: Observer | None,
) -> None:
    parts, used, factors, flaws, average = batch.parts, direction.tensors, None, None, None
    shown = batch.grads.reading.flaws if isinstance(batch.grads, DeviceGradients) else None
    taken: list[Tensor] = []
    first = parts[0].first
    if direction.factors is not None:
        left, right = direction.factors
        factors = left, Matrices.of([right])
    if isinstance(used, DeviceGradients):
        flaws = used.reading.flaws
        if isinstance(first, FullMomentum):
            average = _average(first, parts)
            if observer is not None:
                taken = _taken(first, parts, used)
    moves.move(
        batch.params,
        used.matrices if isinstance(used, DeviceGradients) else Matrices.of(used),
        divisors,
        lr=float(group["lr"]),
        decay=parts[0].decay,
        scale=direction.scale,
        clip=clip,
        flaws=flaws,
        average=average,
        factors=factors,
        rounding=rounding_of(parts, batch.step, group),
        clock=batch.grads.clock if isinstance(batch.grads, DeviceGradients) else None,
    )
    if observer is None:
        return
    watching.see_gradients(observer, batch, shown)
    if average is not None:  # which has taken the gradients in
        momentum = direction = direction._replace(tensors=taken)
        flaws = None
    denominators: watching.Denominating
    if divisors.factors is None:
        denominators = by_part(divisors, len(parts))
    else:
        assert isinstance(batch.grads, DeviceGradients)
        denominators = regression.FittedDivisors(batch.grads, divisors)
    watching.see_updates(observer, parts, momentum, direction, denominators, clip, flaws=flaws)
