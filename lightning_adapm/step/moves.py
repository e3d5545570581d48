"""Moves of parameters by :mod:`lightning_adapm.step.triton_moves`: along which directions, divided by what."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.quantized import BLOCK
from lightning_adapm.step import kernels
from lightning_adapm.step.kernels import Tile
from lightning_adapm.step.launch import Matrices, aligned, launch
from lightning_adapm.step.rounding import StochasticRounding

MOVE, MOVE_CODES, MOVE_CODES_ELEMENTWISE = (1, 2048, 4, 3), (1, 1024, 2, 3), (1, 1024, 4, 3)
MOVE_ALONG, MOVE_ALONG_ELEMENTWISE = (64, 64, 4, 4), (16, 128, 4, 3)
"""Rows and columns of a tile, warps, stages: without products, of momentum in eight bits, and with products, by block
and by elementwise second moments. The fastest of some on an H200, and within the 99 KiB of shared memory that a block
has on smaller GPUs.
"""
MOVE_FITTED = (64, 64, 4, 3)
"""Tile of parameters whose direction and divisors are products in float32's precision."""
HELD, HELD_ELEMENTWISE, HELD_COLUMNS, HELD_RANKS = (128, 64, 8, 2, 128), (64, 64, 4, 3), 512, 128
"""Tiles of programs that hold their rows of up to so many ranks, without and with elementwise second moments, and the
columns that each program moves; the last number bounds the registers of a thread. In two bytes, where reading factors
again for each tile takes longer than reading gradients.
"""


class Divisors(NamedTuple):
    """Denominators of a step, ``roots / correction + eps``, with roots ``(b, m)`` or matrices that broadcast.

    With ``beta2``, they are elementwise averages of the squared direction, which they take before anything else. With
    ``columns`` ``(b, n)``, they are their products with these. With ``factors`` ``(b, m, width)`` and ``(k, n)``, the
    averages are the squares of their product, and there are no roots.
    """

    roots: Tensor | Matrices | None
    correction: float
    eps: float
    beta2: float | None = None
    columns: Tensor | None = None
    factors: tuple[Tensor, Matrices] | None = None

    @property
    def are_averages(self) -> bool:
        """Whether they are averages in memory that take the squared direction."""
        return self.beta2 is not None and self.factors is None

    @property
    def strides(self) -> tuple[int, int]:
        """Elements from one row and one column of roots to the next, 0 where they broadcast; of matrices only."""
        if not isinstance(self.roots, Matrices):
            return 0, 0
        (m, n), like = self.roots.shape, self.roots.like
        return 0 if m == 1 else self.roots.stride, 0 if n == 1 else like.stride(-1)

    @property
    def are_aligned(self) -> bool:
        """Whether every row of roots that are matrices begins at a multiple of 16 bytes."""
        return isinstance(self.roots, Matrices) and self.roots.aligned


class Average(NamedTuple):
    """Averages of full momentum, which take the direction before anything else."""

    values: Matrices
    beta1: float
    scales: Matrices | None = None
    """Scales of values that are codes of :mod:`lightning_adapm.moments.quantized`."""


def move(
    params: Sequence[Tensor],
    directions: Matrices,
    divisors: Divisors,
    *,
    lr: float,
    decay: float,
    scale: float = 1.0,
    clip: float | None = None,
    flaws: Tensor | None = None,
    average: Average | None = None,
    factors: tuple[Tensor, Matrices] | None = None,
    rounding: StochasticRounding | None = None,
    rates: Tensor | None = None,
    clock: Tensor | None = None,
) -> None:
    """``param = (1 - lr decay) param - lr clamp(scale (direction + left right) / (roots / correction + eps))``.

    ``left`` is ``(b, m, width)``, ``right`` ``(k, n)``, the two ``factors``. Instead of the direction, an ``average``
    counts that takes it first. Without ``rounding``, parameters are rounded to nearest. ``rates`` ``(b,)`` multiply
    ``lr``. A ``clock`` on the device replaces ``scale``, ``lr``, the divisors' correction and the number of the step.
    """
    param, (m, n), b = params[0], directions.shape, len(directions.addresses)
    moved = Matrices.of(params, stacks=directions.like.dim() == 3)
    values, beta1, scales = average or (None, 0.0, None)
    left, right = factors or (None, None)
    columns, elementwise = divisors.columns, divisors.are_averages
    root_left, root_right = divisors.factors or (None, None)
    held = HELD_COLUMNS if _holds(param, left, divisors) else 0
    fitted = divisors.factors is not None
    tile = Tile(*_tile(factors is not None, held > 0, elementwise, scales is not None, fitted)).narrowed(n)
    # heads of a fused weight are one matrix of the gradient
    grouped = param.dim() > directions.like.dim()
    rows, stride = (param.shape[1], param.stride(0)) if grouped else (m, 0)
    k, width = (0, 0) if left is None or right is None else (right.shape[0], left.shape[-1])
    each = 1 if flaws is None else b // len(flaws)
    streams, step = (None, 0.0) if rounding is None else (rounding.table(m * n, b, param.device), rounding.step)
    high, across, _ = tile._replace(columns=held or tile.columns).grid(m, n, b)
    launch(
        "move",
        (high * across, b, 1),
        (
            *(moved, directions, divisors.roots, flaws, values, left, right),
            *(columns, root_left, root_right, streams, scales, rates, clock),
        ),
        (m, n, k, width, rows, stride, moved.stride, directions.stride, *divisors.strides, each),
        # steps are counted in float32: exact
        (beta1, scale, divisors.correction, divisors.eps, divisors.beta2 or 0.0, lr, decay, clip or 0.0, step),
        PARAMETER=moved.dtype,
        DIRECTION=directions.dtype,
        AVERAGE=(values or moved).dtype,
        RIGHT=(right or moved).dtype,
        FACTOR=kernels.FACTOR,
        ALIGNED=aligned(moved, directions, values, right, root_right) and (not elementwise or divisors.are_aligned),
        GROUPED=grouped,
        CHECKED=flaws is not None,
        DENSE=isinstance(divisors.roots, Tensor),
        FACTORED=columns is not None,
        ELEMENTWISE=elementwise,
        AVERAGED=average is not None,
        SPAN=0 if scales is None else min(BLOCK, tile.columns),
        CLAMP=clip is not None,
        FACTORS=factors is not None,
        FITTED=fitted,
        STOCHASTIC=rounding is not None,
        EVEN=rounding is not None and rounding.is_even(n),
        RATED=rates is not None,
        CLOCKED=clock is not None,
        BLOCK_K=max(16, kernels.power_of_two(width)) if held else 32,
        HELD=held,
        STAGES=tile.stages,
        **tile.constants,
    )
    torch.autograd.graph.increment_version(params)  # as every operation in place, for whoever goes backward again


def _holds(param: Tensor, left: Tensor | None, divisors: Divisors) -> bool:
    """Whether programs hold their rows of the left factor."""
    fits = left is not None and left.shape[-1] <= HELD_RANKS and divisors.factors is None
    return fits and param.element_size() == 2 and kernels.has_large_blocks(param.device)


def _tile(along: bool, held: bool, elementwise: bool, coded: bool, fitted: bool) -> tuple[int, ...]:
    if fitted:
        return MOVE_FITTED
    if not along:
        if coded:
            return MOVE_CODES_ELEMENTWISE if elementwise else MOVE_CODES
        return MOVE
    if held:
        return HELD_ELEMENTWISE if elementwise else HELD
    return MOVE_ALONG_ELEMENTWISE if elementwise else MOVE_ALONG
