"""The interface of :mod:`lightning_adapm.step.triton_kernels`: supported matrices, their tiles, and the results."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.quantized import BLOCK
from lightning_adapm.moments.second import largest
from lightning_adapm.sharding.find import has_values
from lightning_adapm.step.launch import DTYPES, Matrices, launch
from lightning_adapm.step.rounding import StochasticRounding

FACTOR = torch.bfloat16
"""Dtype of the factors of a basis on their way to the parameters. Tensor cores multiply it twice as fast as TF32. The
average itself keeps its own precision, and the gradient is added in float32.
"""

READ, COLUMNS, PROJECT, COMBINE = (16, 512, 4, 3), (16, 256, 4, 3), (64, 64, 4, 3), (64, 128, 4, 3)
MOVE, MOVE_ALONG, MOVE_ALONG_ELEMENTWISE = (1, 2048, 4, 3), (64, 64, 4, 4), (16, 128, 4, 3)
"""Rows and columns of a tile, warps, stages: of sums over rows, of sums over columns, of sums over rows with products,
of a combination; of a move without products and with them, by block and by elementwise second moments. The fastest of
some on an H200, and within the 99 KiB of shared memory that a block has on smaller GPUs.
"""


_LARGEST, _TINY = largest(torch.float32), torch.finfo(torch.float32).tiny

MOST_ROWS_OF_A_HEAD, ADVANCED_NUMEL = 256, 4096
"""Rows that share one second moment are a single tile of :func:`advance` up to so many, with the columns that registers
hold.
"""

_ROWS_OF_A_SUM, _ROWS_OF_A_PRODUCT = 512, 4096
"""Sums of columns, and products from the left, are taken of so many rows each: enough programs for a device, also where
a table of tokens is the only matrix of its shape. Tiles of rows divide them.
"""

MOST_COLUMNS = 1 << 21
"""Maximum number of tiles along columns in a grid."""


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run on a device; Triton requires NVIDIA GPUs of compute capability 8.0 or higher."""
    return device.type == "cuda" and _supported(device)


@cache
def _supported(device: torch.device) -> bool:
    if torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def readable(matrices: Sequence[Tensor]) -> bool:
    """Whether tensors are vectors, matrices or stacks of matrices of one layout that the kernels support."""
    first = matrices[0]
    if not has_values(first):
        return False
    fits = first.dim() in (1, 2, 3) and first.numel() > 0 and first.shape[-1] <= MOST_COLUMNS
    return runs_on(first.device) and fits and _alike(matrices)


def movable(params: Sequence[Tensor], directions: Sequence[Tensor]) -> bool:
    """Whether the kernels support the layouts of parameters and of their directions."""
    param, matrix = params[0], directions[0]
    heads = param.dim() == 3 and matrix.dim() == 2 and (len(param) * param.shape[1], param.shape[2]) == matrix.shape
    fit = param.shape == matrix.shape or heads
    return readable(directions) and fit and _alike(params)


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors have one supported dtype and one layout without gaps in the last dimension."""
    first = tensors[0]
    if first.dtype not in DTYPES or first.stride(-1) != 1:
        return False
    shape, stride = first.shape, first.stride()
    return all(other.shape == shape and other.stride() == stride for other in tensors)


class Reading(NamedTuple):
    """Results of one pass over ``b`` gradients."""

    squares: Tensor
    """Sums of squares of rows, ``(b, m)``."""
    flaws: Tensor
    """Flaws ``(gradients,)``, int32, not 0 where a gradient has an entry that is not finite."""


def read(
    grads: Matrices, gradients: int, bases: Matrices | None, r: int, known: Reading | None
) -> tuple[Tensor | None, Reading]:
    """Products of ``grads`` with the transposed ``bases`` ``(r, n)``, ``(b, m, padded(r))``; and what else so many
    ``gradients`` show, unless that is ``known``.
    """

    like, b = grads.like, len(grads.addresses)
    m, n = grads.shape
    width = padded(r)
    projected = None if bases is None else like.new_empty((b, m, width), dtype=torch.float32)
    found = known or Reading(like.new_empty((b, m), dtype=torch.float32), like.new_zeros(gradients, dtype=torch.int32))
    block_m, block_n, warps, stages = _narrowed(READ if bases is None else PROJECT, n)
    block_r = 16 if bases is None else block(r)
    launch(
        "read",
        (-(-m // block_m), b, max(1, -(-width // block_r))),
        (
            grads.table,
            grads.table if bases is None else bases.table,
            found.squares if projected is None else projected,
            *found,
        ),
        (m, n, r, width, grads.stride, b // gradients),
        (1.0,),
        GRAD=like.dtype,
        BASIS=(like if bases is None else bases.like).dtype,
        FACTOR=FACTOR,
        ALIGNED=grads.aligned and (bases is None or bases.aligned),
        FIRST=known is None,
        PROJECT=bases is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=warps,
        num_stages=stages,
    )
    return projected, found


def columns(grads: Matrices) -> Tensor:
    """Sums of squares of the columns, ``(b, n)``, finite or not."""

    like, b = grads.like, len(grads.addresses)
    m, n = grads.shape
    block_m, block_n, warps, stages = _narrowed(COLUMNS, n)
    parts = -(-m // _ROWS_OF_A_SUM)
    sums = like.new_empty((b, parts, n), dtype=torch.float32)
    launch(
        "columns",
        (-(-n // block_n), b, parts),
        (grads.table, sums),
        (m, n, grads.stride, _ROWS_OF_A_SUM),
        (),
        GRAD=like.dtype,
        ALIGNED=grads.aligned,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return sums.sum(dim=1)


def combine(grads: Matrices, weights: Tensor, flaws: Tensor) -> Tensor:
    """Multiply transposed ``weights`` ``(b, m, r)`` by ``grads`` ``(m, n)``; gradients with a flaw count as zero."""

    b, m, r = weights.shape
    n = grads.shape[1]
    parts = -(-m // _ROWS_OF_A_PRODUCT)
    product = weights.new_empty(b, parts, r, n)
    block_m, block_n, warps, stages = _narrowed(COMBINE, n)
    launch(
        "combine",
        (-(-n // block_n), b, -(-r // block(r)) * parts),
        (grads.table, weights.to(FACTOR).contiguous(), flaws, product),  # weights: read by every block of columns
        (m, n, r, grads.stride, b // len(flaws), parts, _ROWS_OF_A_PRODUCT),
        (),
        GRAD=grads.like.dtype,
        FACTOR=FACTOR,
        ALIGNED=grads.aligned,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block(r),
        num_warps=warps,
        num_stages=stages,
    )
    return product.squeeze(1) if parts == 1 else product.sum(dim=1)


class Refreshed(NamedTuple):
    """Left factors at a refresh, ``(b, m, r)`` in float32."""

    held: Tensor
    """Left factors in the old basis."""
    moved: Tensor
    """Left factors in the new basis."""
    flush: float
    """Factor of the difference, which is applied at once."""


def advance(
    reading: Reading,
    projected: Tensor | None,
    lefts: Matrices | None,
    refreshed: Refreshed | None,
    averages: Matrices | None,
    shape: torch.Size,
    blocks: int | None,
    betas: tuple[float, float],
    correction: float,
    clock: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Take a reading of gradients of ``shape`` ``(m, n)`` into low-rank momenta, if there are ``lefts``, and into block
    second moments, if there are ``averages``, of each row or of ``blocks``. ``correction`` is Adam's of the momentum,
    which a ``clock`` on the device has, too.

    Returns:
        What times the basis is to be added to the gradients, ``(b, m, width)``, or, where it was ``refreshed``, times
        the new basis and the one before it; and roots of the second moments by row, ``(b, m)``.
    """

    squares, flaws = reading
    b, (m, n) = len(squares), shape
    r = 0 if lefts is None else lefts.like.shape[-1]
    width = padded(r if refreshed is None else 2 * r)
    span = 16 if blocks is None else m // blocks
    if lefts is not None and averages is not None and span > MOST_ROWS_OF_A_HEAD:  # each in tiles of its own
        factors, _ = advance(reading, projected, lefts, refreshed, None, shape, None, betas, correction, clock)
        _, roots = advance(reading, None, None, None, averages, shape, blocks, betas, correction, clock)
        return factors, roots
    factors = None if projected is None else squares.new_empty((b, m, width), dtype=FACTOR)
    roots = None if averages is None else torch.empty_like(squares)
    launch(
        "advance",
        (-(-m // span), b, 1),
        (
            squares if projected is None else projected,
            squares,
            flaws,
            flaws if lefts is None else lefts.table,
            flaws if averages is None else averages.table,
            squares if refreshed is None else refreshed.held,
            squares if refreshed is None else refreshed.moved,
            squares if factors is None else factors,
            squares if roots is None else roots,
            squares if clock is None else clock,
        ),
        (m, r, 0 if projected is None else projected.shape[-1], width, span, b // len(flaws)),
        (
            float(n if blocks is None else n * span),
            _LARGEST,
            *betas,
            correction,
            0.0 if refreshed is None else refreshed.flush,
        ),
        LEFT=(squares if lefts is None else lefts.like).dtype,
        FACTOR=FACTOR,
        LOW_RANK=lefts is not None,
        REFRESHED=refreshed is not None,
        BLOCKS=averages is not None,
        SHARED=blocks is not None,
        CLOCKED=clock is not None,
        BLOCK_M=min(power_of_two(span), 1024),
        BLOCK_R=max(16, min(64, ADVANCED_NUMEL // power_of_two(span), power_of_two(width))),
    )
    return factors, roots


def factor(
    reading: Reading,
    sums: Tensor,
    averages: tuple[Matrices, Matrices],
    shape: torch.Size,
    beta2: float,
    extra: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Take a reading of gradients of ``shape`` ``(m, n)`` and their ``sums`` over columns, which are overwritten, into
    ``averages`` of means of squares, plus ``extra``, over rows ``(m, 1)`` and columns ``(1, n)``.

    Returns:
        Factors of the roots of the second moments: of the averages of rows over their mean ``(b, m)``, and ``(b, n)``.
    """
    squares, flaws = reading
    (m, n), shares = shape, torch.empty_like(squares)
    rows, columns = averages
    launch(
        "factor",
        (len(squares), 1, 1),
        (squares, sums, flaws, rows.table, columns.table, shares),
        (m, n, len(squares) // len(flaws)),
        (float(m), float(n), _LARGEST, _TINY, beta2, extra),
        BLOCK=1024,
    )
    return shares, sums


def relate(grads: Matrices, shares: Tensor, roots: Tensor, flaws: Tensor) -> Tensor:
    """Sums of squares ``(b,)`` of gradients over the products of ``shares`` ``(b, m)`` and ``roots`` ``(b, n)``."""
    b, (m, n) = len(grads.addresses), grads.shape
    block_m, block_n, warps, stages = _narrowed(MOVE, n)
    grid = -(-m // block_m), -(-n // block_n), b
    sums = shares.new_empty(b, grid[0] * grid[1])
    launch(
        "relate",
        grid,
        (grads.table, shares, roots, flaws, sums),
        (m, n, grads.stride, b // len(flaws)),
        (),
        GRAD=grads.like.dtype,
        ALIGNED=grads.aligned,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
    return sums.sum(dim=1)


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
    block_m, block_n, warps, stages = _narrowed(MOVE if factors is None else along, n)
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
        FACTOR=FACTOR,
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


def _narrowed(tile: tuple[int, int, int, int], n: int) -> tuple[int, int, int, int]:
    """Trade columns of a tile for rows where the matrix has fewer columns, ``n``."""
    rows, columns, warps, stages = tile
    width = min(columns, max(16, power_of_two(n)))
    return rows * columns // width, width, warps, stages


def padded(r: int) -> int:
    """Columns of a left factor of rank ``r``, padded so that tensor cores can load its rows."""
    return -(-r // 16) * 16


def block(r: int) -> int:
    """Power of two for a rank that a tile of a product can have."""
    return min(128, max(16, power_of_two(r)))


def power_of_two(number: int) -> int:
    """Smallest power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()
