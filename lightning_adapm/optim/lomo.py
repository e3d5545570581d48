"""LOMO and AdaLomo: no momentum, and gradients that are used while backward is still running."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Denominators, Direction, Momentum, SecondMoment
from lightning_adapm.moments.first import NoMomentum
from lightning_adapm.moments.second import NoSecondMoment, RelativeSecondMoment
from lightning_adapm.optim.base import RoleOptimizer
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.reduction import Reduction
from lightning_adapm.step import by_torch
from lightning_adapm.step.batching import Batch
from lightning_adapm.step.parts import Part
from lightning_adapm.step.paths import Path
from lightning_adapm.step.relative import SMALLEST
from lightning_adapm.step.rounding import rounding_of, widened


class Lomo(RoleOptimizer):
    """LOMO (arXiv 2306.09782): stochastic gradient descent that uses each gradient inside backward.

    Args:
        params: Named parameters or parameter groups, as for :class:`~lightning_adapm.AdaPM`.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        roles: Roles for names. They decide nothing but ``no_decay``.
        unmatched: ``"error"`` refuses matrices whose role is not found; any policy takes them.
        no_decay: Roles exempt from weight decay.
        maximize: Whether the objective is maximized.
        rounding: How bfloat16 and float16 parameters are rounded, ``"stochastic"`` or ``"nearest"``, as for AdaPM.
        update_in_backward: Whether ``step(closure)`` moves parameters and frees their gradients inside backward, as for
            AdaPM, but by default. Several processes, and backward passes outside of ``step``, get an ordinary step.

    Raises:
        ValueError: An option is out of range, or a matrix has no role where ``unmatched="error"``.
        TypeError: Parameters lack names and roles, or are complex.

    State of a parameter:

    - ``step``: number of steps, a float32 scalar on the CPU.

    Numerics: the update is computed in float32, or float64 for float64 parameters, and rounded once to the parameter's
    dtype. On CUDA, kernels move the parameters, without copies of gradients.

    A gradient with an infinity or a NaN is taken as zero, for the whole piece, and counted: see
    :meth:`nonfinite_gradients`.

    Example::

        optimizer = Lomo(model.named_parameters(), lr=0.1)

        def closure():
            loss = model(batch)
            loss.backward()  # parameters move, gradients go
            return loss

        optimizer.step(closure)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        roles: Mapping[str, str] | None = None,
        unmatched: str = "none",
        no_decay: Iterable[str] = (),
        maximize: bool = False,
        rounding: str = "stochastic",
        update_in_backward: bool = True,
        **left_over: Any,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "no_decay": no_decay,
                "maximize": maximize,
                "rounding": rounding,
            },
            roles=roles,
            unmatched=unmatched,
            update_in_backward=update_in_backward,
            left_over=left_over,
            roles_matter=False,
        )

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        """Choose no momentum."""
        return NoMomentum()

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        """Choose no second moment."""
        return NoSecondMoment()


class AdaLomo(RoleOptimizer):
    """AdaLomo (arXiv 2310.10195): LOMO with a factored second moment and updates relative to the parameter's size.

    ``U = G / sqrt(v)`` with ``v`` of row and column means, ``U /= max(1, RMS(U) / clip_threshold)``, and a step of
    ``lr * max(1e-3, RMS(W)) * U`` after decoupled weight decay with the same factor. It works on pieces: of a fused
    weight the queries, the keys and the values by themselves.

    Args:
        params: Named parameters or parameter groups, as for :class:`~lightning_adapm.AdaPM`.
        lr: Learning rate, relative to the size of the parameters.
        weight_decay: Decoupled weight decay.
        clip_threshold: Bound on the root mean square of ``U``.
        roles: Roles for names. They decide how fused weights are cut.
        unmatched: ``"error"`` refuses matrices whose role is not found; any policy takes each of them as one piece.
        no_decay: Roles exempt from weight decay.
        maximize: Whether the objective is maximized.
        rounding: How bfloat16 and float16 parameters are rounded, ``"stochastic"`` or ``"nearest"``, as for AdaPM.
        update_in_backward: Whether parameters move inside backward, as for Lomo.

    Raises:
        ValueError: An option is out of range, or a matrix has no role where ``unmatched="error"``.
        TypeError: Parameters lack names and roles, or are complex.

    State of a parameter whose matrix is ``(m, n)``; a fused weight has the entries per piece,
    ``query.exp_avg_sq_row``:

    - ``step``: number of steps, a float32 scalar on the CPU.
    - ``exp_avg_sq_row`` ``(m, 1)`` and ``exp_avg_sq_col`` ``(1, n)``, float32 (float64 for float64 parameters): means
      of squares.
    - ``exp_avg_sq`` in place of both where the parameter is not a matrix, in its shape.

    Numerics: arithmetic is in float32, or float64 for float64 parameters, and parameters are rounded once. On CUDA,
    kernels move parameters, and torch's operations shards. A gradient with an infinity or a NaN is taken as zero, for
    the whole piece.

    Example::

        optimizer = AdaLomo(model.named_parameters(), lr=5e-4)
        trainer.fit(module)  # or optimizer.step(closure)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        roles: Mapping[str, str] | None = None,
        unmatched: str = "none",
        no_decay: Iterable[str] = (),
        maximize: bool = False,
        rounding: str = "stochastic",
        update_in_backward: bool = True,
        **left_over: Any,
    ) -> None:
        if clip_threshold is None:
            raise ValueError("clip_threshold must be a number > 0, but got None; write 1e9 for no bound")
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "clip_threshold": clip_threshold,
                "no_decay": no_decay,
                "maximize": maximize,
                "rounding": rounding,
            },
            roles=roles,
            unmatched=unmatched,
            update_in_backward=update_in_backward,
            left_over=left_over,
            roles_matter=False,
        )

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        """Choose no momentum."""
        return NoMomentum()

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        """Choose row and column means."""
        return RelativeSecondMoment()

    def path_for(self, parts: Sequence[Part], grads: Sequence[Tensor], group: Mapping[str, Any]) -> Path:
        path = super().path_for(parts, grads, group)
        if path.whole or not path.moved_by_kernels:
            return path
        return Path("torch", path.reason)  # updates are scaled by the size of their matrix

    def move(self, batch: Batch, group: Mapping[str, Any]) -> None:
        along = Direction(batch.grads, 1.0, scratch=False, clamp=None)
        stacks = batch.grads[0].dim() > 2  # of which a tile has whole matrices
        tiles = ((tile, denominators) for tile, _, denominators in by_torch.tiles(batch, along))
        for _, several in groupby(tiles, lambda each: (each[0].start, stacks and each[0].first)):
            _move(list(several), batch, group)


def _move(tiles: Sequence[tuple[Batch, Denominators]], batch: Batch, group: Mapping[str, Any]) -> None:
    """Move all tiles of some matrices. Several are gone through twice, because what a matrix moves depends on all."""
    lr, clip, decay = float(group["lr"]), float(group["clip_threshold"]), batch.parts[0].decay
    begin = tiles[0][0]
    rounding = rounding_of(begin.parts, batch.step, group)
    kept = [_updates(*tiles[0])] if len(tiles) == 1 else []
    lengths = _sums_of_squares((kept or [_updates(*each)])[0] for each in tiles)
    sizes = _sums_of_squares(_matrices(tile) for tile, _ in tiles)
    whole = batch.grads[begin.start : begin.start + len(begin.parts)]
    lengths, sizes = (_root_means(sums, whole, batch.reduction) for sums in (lengths, sizes))
    rates = [lr * size.clamp_min(SMALLEST) for size in sizes]
    for tile, denominators in tiles:
        moved = tile.params if rounding is None else widened(tile.params)
        updates = kept[0] if kept else _updates(tile, denominators)
        for param, update, rate, length in zip(moved, updates, rates, lengths, strict=True):
            if decay:
                param.mul_(1 - rate * decay)
            param.sub_(update.mul_(rate / (length / clip).clamp_min(1.0)).view(param.shape))
        if rounding is not None:
            rounding.write(tile.params, moved, tile.first)


def _updates(tile: Batch, denominators: Denominators) -> list[Tensor]:
    """Gradients over the roots of their second moments."""
    divisors, _ = denominators.settle(as_adamw=True)
    return list(torch._foreach_div(tile.grads, divisors))


def _matrices(tile: Batch) -> list[Tensor]:
    """Parameters in the shapes of their gradients: views may have a dimension for heads, or those of a convolution."""
    pairs = zip(tile.params, tile.grads, strict=True)
    return [param.to(grad.dtype).reshape(grad.shape) for param, grad in pairs]


def _sums_of_squares(tiles: Iterable[list[Tensor]]) -> list[Tensor]:
    """Sum of squares over all tiles of each tensor; for stacks, of each matrix."""
    sums: list[Tensor] = []
    for values in tiles:
        dims = [(-2, -1) if value.dim() > 1 else None for value in values]
        own = [value.square().sum(dim, keepdim=dim is not None) for value, dim in zip(values, dims, strict=True)]
        sums = own if not sums else list(torch._foreach_add(sums, own))
    return sums


def _root_means(sums: list[Tensor], grads: list[Tensor], reduction: Reduction) -> list[Tensor]:
    """Roots of the means over all processes, of sums over each matrix or vector."""
    widths = [grad.shape[-1] if grad.dim() > 1 else 1 for grad in grads]
    counts = [size * width for size, width in zip(reduction.sizes(grads), widths, strict=True)]
    return [(total / max(1, count)).sqrt() for total, count in zip(reduction.total(sums), counts, strict=True)]
