"""Moves of parameters by :mod:`lightning_adapm.step.triton_moves`: along which directions, divided by what."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.quantized import BLOCK
from lightning_adapm.step import kernels
from lightning_adapm.step.launch import Matrices, launch
from lightning_adapm.step.rounding import StochasticRounding

MOVE, MOVE_ALONG, MOVE_ALONG_ELEMENTWISE = (1, 2048, 4, 3), (64, 64, 4, 4), (16, 128, 4, 3)
"""Rows and columns of a tile, warps, stages: without products, and with them, by block and by elementwise second
moments. The fastest of some on an H200, and within the 99 KiB of shared memory that a block has on smaller GPUs.
"""


class Divisors(NamedTuple):
    """Denominators of a step, ``roots / correction + eps``, with roots ``(b, m)`` or matrices that broadcast.

    With ``beta2``, they are elementwise averages of the squared direction, which they take before anything else. With
    ``columns`` ``(b, n)``, they are their products with these.
    """

    roots: Tensor | Matrices
    correction: float
    eps: float
    beta2: float | None = None
    columns: Tensor | None = None


class Average(NamedTuple):
    """Averages of full momentum, which take the direction before anything else."""

    values: Matrices
    beta1: float
    scales: Matrices | None = None
    """Scales of values that are codes of :mod:`lightning_adapm.moments.quantized`."""


def move(
    params: Sequence[Tensor],
    directions: Matrices,
    flaws: Tensor | None,
    average: Average | None,
    factors: tuple[Tensor, Matrices] | None,
    divisors: Divisors,
    scale: float,
    lr: float,
    decay: float,
    clip: float | None,
    rounding: StochasticRounding | None,
    rates: Tensor | None = None,
    clock: Tensor | None = None,
) -> None:
    """``param = (1 - lr decay) param - lr clamp(scale (direction + left right) / (roots / correction + eps))``.

    ``left`` is ``(b, m, width)``, ``right`` ``(k, n)``, the two ``factors``. Instead of the direction, an ``average``
    counts that takes it first. Without ``rounding``, parameters are rounded to nearest. ``rates`` ``(b,)`` multiply
    ``lr``. A ``clock`` on the device replaces ``scale``, ``lr``, the divisors' correction and the number of the step.
    """

    param, used = params[0], directions.like
    m, n = directions.shape
    grouped = param.dim() > used.dim()  # heads of a fused weight, which are one matrix of the gradient
    moved = Matrices.of(params, stacks=used.dim() == 3)
    known, strides = [moved, directions], [0, 0]
    if isinstance(divisors.roots, Matrices):
        like = divisors.roots.like
        apart = (divisors.roots.stride, like.stride(-1))
        strides = [0 if size == 1 else step for size, step in zip(divisors.roots.shape, apart, strict=True)]
        known += [] if divisors.beta2 is None else [divisors.roots]
    if average is not None:
        known.append(average.values)
    if factors is not None:
        known.append(factors[1])
    along = MOVE_ALONG if divisors.beta2 is None else MOVE_ALONG_ELEMENTWISE
    block_m, block_n, warps, stages = kernels.narrowed(MOVE if factors is None else along, n)
    b = len(directions.addresses)
    launch(
        "move",
        (-(-m // block_m), -(-n // block_n), b),
        (
            moved.table,
            directions.table,
            divisors.roots.table if isinstance(divisors.roots, Matrices) else divisors.roots,
            moved.table if flaws is None else flaws,
            moved.table if average is None else average.values.table,
            moved.table if factors is None else factors[0],
            moved.table if factors is None else factors[1].table,
            moved.table if divisors.columns is None else divisors.columns,
            moved.table if rounding is None else rounding.table(m * n, b, param.device),
            moved.table if average is None or average.scales is None else average.scales.table,
            moved.table if rates is None else rates,
            moved.table if clock is None else clock,
        ),
        (
            m,
            n,
            0 if factors is None else factors[1].like.shape[-2],
            0 if factors is None else factors[0].shape[-1],
            param.shape[1] if grouped else m,
            param.stride(0) if grouped else 0,
            moved.stride,
            directions.stride,
            *strides,
            1 if flaws is None else b // len(flaws),
        ),
        (
            0.0 if average is None else average.beta1,
            scale,
            divisors.correction,
            divisors.eps,
            divisors.beta2 or 0.0,
            lr,
            decay,
            clip or 0.0,
            0.0 if rounding is None else float(rounding.step),  # exact: steps are counted in float32
        ),
        PARAMETER=param.dtype,
        DIRECTION=used.dtype,
        AVERAGE=(param if average is None else average.values.like).dtype,
        RIGHT=(param if factors is None else factors[1].like).dtype,
        FACTOR=kernels.FACTOR,
        ALIGNED=all(matrices.aligned for matrices in known),
        CHECKED=flaws is not None,
        DENSE=isinstance(divisors.roots, Tensor),
        FACTORED=divisors.columns is not None,
        ELEMENTWISE=divisors.beta2 is not None,
        AVERAGED=average is not None,
        SPAN=0 if average is None or average.scales is None else min(BLOCK, block_n),
        CLAMP=clip is not None,
        FACTORS=factors is not None,
        STOCHASTIC=rounding is not None,
        RATED=rates is not None,
        CLOCKED=clock is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=32,
        num_warps=warps,
        num_stages=stages,
    )
    torch.autograd.graph.increment_version(params)  # as every operation in place, for whoever goes backward again
