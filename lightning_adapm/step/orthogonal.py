"""Orthogonal updates by :mod:`lightning_adapm.step.triton_orthogonal`, as :mod:`lightning_adapm.moments.orthogonal`.

The direction is written once, in the dtype of products. All products of Newton-Schulz but those with the matrix itself
are symmetric, and half of each is computed.
"""

from collections.abc import Generator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.base import Direction
from lightning_adapm.moments.batches import split
from lightning_adapm.moments.orthogonal import COEFFICIENTS, parts_of, sized
from lightning_adapm.sharding.collectives import Planned, summing
from lightning_adapm.sharding.owners import Owners
from lightning_adapm.sharding.reduction import ProcessReduction, Reduction
from lightning_adapm.step import kernels
from lightning_adapm.step.kernels import Tile
from lightning_adapm.step.launch import Matrices, aligned, described_by, launch
from lightning_adapm.step.moves import Average

DIRECT, DIRECT_ALONG = (16, 128, 4, 3), (64, 64, 4, 3)
"""Rows and columns of a tile, warps, stages: without a product of factors and with it."""
SYMMETRIC, LARGE_SYMMETRIC, SMALL_SYMMETRIC = (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 128, 32, 8, 4)
"""Rows, columns and depth of a tile, warps, stages: of square matrices, of longer or large ones, and of both within the
99 KiB of shared memory that a block has on smaller GPUs. Columns are a multiple of rows. The fastest of some on an
H100.
"""
_LARGE = 2048
"""Rows of products whose tiles are so many that larger ones leave few multiprocessors without work."""
_TILES = 1024
"""Numbers of tiles that a program adds at once."""
_RESCALED = 4096
"""Elements of a tile."""
_ORDINARY = 1e-15, 1e15
"""Norms whose squares neither over- nor underflow: they are divided out of small matrices, which saves a pass."""


def direct(
    grads: Matrices,
    flaws: Tensor,
    average: Average | None,
    factors: tuple[Tensor, Matrices] | None,
    share: float,
) -> tuple[Tensor, Tensor]:
    """Directions ``(b, m, n)`` in the dtype of products, and their squared norms ``(b,)`` in float64.

    Args:
        grads: Gradients; those with ``flaws`` count as zero.
        flaws: Flaws of the gradients, of which a stack has one.
        average: Full momentum, which takes the gradients.
        factors: Factors of what low-rank momentum differs in from the gradient.
        share: Share of the momentum in the direction; the rest is the gradient.
    """
    (m, n), b = grads.shape, len(grads.addresses)
    left, right = factors or (None, None)
    values, beta1, _ = average or (None, 0.0, None)
    tile = Tile(*(DIRECT if factors is None else DIRECT_ALONG))
    grid = tile.grid(m, n, b)
    found = grads.like.new_empty((b, m, n), dtype=kernels.FACTOR)
    sizes = grads.like.new_empty((b, 2, grid[0] * grid[1]), dtype=torch.float32)
    launch(
        "direct",
        grid,
        (grads, values, left, right, flaws, found, sizes),
        (
            m,
            n,
            0 if right is None else right.shape[0],
            0 if left is None else left.shape[-1],
            grads.stride,
            b // len(flaws),
        ),
        (beta1, share),
        GRAD=grads.dtype,
        AVERAGE=(values or grads).dtype,
        RIGHT=(right or grads).dtype,
        FACTOR=kernels.FACTOR,
        ALIGNED=aligned(grads, values, right),
        AVERAGED=average is not None,
        FACTORS=factors is not None,
        BLOCK_K=64,
        **tile.constants,
    )
    squares = grads.like.new_empty(b, dtype=torch.float64)
    launch("norms", (b, 1, 1), (sizes, squares), (sizes.shape[-1],), (), BLOCK=_TILES)
    return found, squares


def updates(
    found: Tensor, squares: Tensor, steps: int, like: list[Tensor], reduction: Reduction
) -> Generator[Sequence[Planned], None, Direction]:
    """Updates along directions, which are found when the generator returns; it yields what it has to wait for.

    Args:
        found: Directions ``(b, m, n)`` in the dtype of products, which are overwritten. Of shards, the rows of this
            process; no row is cut.
        squares: Their squared norms ``(b,)`` in float64, which are completed.
        steps: Number of steps of Newton-Schulz.
        like: Matrices and stacks of them, one for each part.
        reduction: Completion of sums over rows.
    """
    if not isinstance(reduction, ProcessReduction):
        return updates_of_whole(found, squares, steps, like)
    owners = Owners(reduction.shards, found.dtype)
    planned, collected = owners.collect(found)
    yield [summing(squares, reduction.group), *planned]
    planned, given_back = owners.give_back(_orthogonalized(collected(), owners.mine(squares), steps), found)
    del collected  # which holds the matrices
    yield planned
    return sized(given_back(), reduction.shards[0].size)


def updates_of_whole(found: Tensor, squares: Tensor, steps: int, like: list[Tensor]) -> Direction:
    """:func:`updates` along directions of whole matrices."""
    return sized(split(_orthogonalized(found, squares, steps), like), found.shape[-2])


def _orthogonalized(found: Tensor, squares: Tensor, steps: int) -> Tensor:
    """Orthogonal matrices by Newton-Schulz; zero where that is impossible. ``found`` is overwritten."""
    b = len(squares)
    rescaled, inverses = (squares.new_empty(b, dtype=torch.float32) for _ in range(2))
    tiny = torch.finfo(torch.float32).tiny
    launch("scales", (-(-b // _TILES), 1, 1), (squares, rescaled, inverses), (b,), (*_ORDINARY, tiny), BLOCK=_TILES)
    _rescale(found, rescaled)
    return iterated(found, steps, inverses)


def _rescale(found: Tensor, factors: Tensor) -> None:
    """Multiply each of ``b`` matrices by its own of ``factors`` ``(b,)``."""
    numel = found.shape[1:].numel()
    launch(
        "rescale",
        (-(-numel // _RESCALED), len(found), 1),
        (found, factors),
        (numel,),
        (),
        FACTOR=found.dtype,
        BLOCK=_RESCALED,
    )


def iterated(found: Tensor, steps: int, inverse: Tensor | None = None) -> Tensor:
    """Iterate on matrices ``(b, m, n)`` of norm 1 or 0, or on others times the ``inverse`` ``(b,)`` of their norms.

    The form with less work is that of torch's operations, because a symmetric product takes as long as all of it there.
    ``found`` is overwritten: matrices are multiplied from one memory to another and back.
    """
    if not found.numel():
        return found
    wide, other = found.shape[-2] <= found.shape[-1], None
    for number in parts_of(found.shape, found.dtype, steps):
        rows = found if wide else found.mT
        gram = symmetric(rows, rows, factors=None if inverse is None else inverse.square())
        product = _product(gram, number, inverse)
        found, other = torch.bmm(*(product, found) if wide else (found, product), out=other), found
        inverse = None
    return found


def _product(gram: Tensor, steps: int, factors: Tensor | None) -> Tensor:
    """Matrix that stands for several steps, computed from the Gram matrix, times each matrix's own of ``factors``."""
    product = polynomial = _polynomial(gram, factors if steps == 1 else None)
    for step in range(2, steps + 1):
        gram = symmetric(polynomial, symmetric(polynomial, gram))  # the matrix's next Gram matrix
        polynomial = _polynomial(gram)
        product = symmetric(polynomial, product, factors=factors if step == steps else None)
    return product


def _polynomial(gram: Tensor, factors: Tensor | None = None) -> Tensor:
    """Compute ``a I + b S + c S²``.

    The rounding of ``a`` on the diagonal costs no more than that of the products: where it stands in all of them alike,
    it changes the polynomial a little, and no Gram matrix loses its small eigenvalues.
    """
    a, b, c = COEFFICIENTS
    return symmetric(gram, gram, gram, c, b, a, factors)


def symmetric(
    left: Tensor,
    right: Tensor,
    added: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    diagonal: float = 0.0,
    factors: Tensor | None = None,
) -> Tensor:
    """``factors (alpha left rightᵀ + beta added + diagonal I)``, ``(b, m, m)``, where that is symmetric.

    Args:
        left: Matrices ``(b, m, k)``, or transposed ones.
        right: Matrices with the same strides. Those that are symmetric need not be transposed.
        added: Symmetric matrices ``(b, m, m)``.
        alpha: Factor of the product.
        beta: Factor of what is added.
        diagonal: Number that is added on the diagonal.
        factors: Factors of everything, ``(b,)`` in float32.
    """
    b, m, k = left.shape
    found = left.new_empty(b, m, m)
    described, tile = _describable(left), SMALL_SYMMETRIC
    if kernels.has_large_blocks(left.device):
        tile = LARGE_SYMMETRIC if k > m or (described and m >= _LARGE) else SYMMETRIC
    block_m, block_n, block_k, warps, stages = tile
    transposed = left.stride(-1) != 1
    tiles: tuple[Any, ...] = (None,) * 5
    if described:
        other = found if added is None else added
        sides = [(each, (rows, block_k)) for each, rows in ((left, block_m), (right, block_n))]
        if transposed:
            sides = [(each.mT, (block_k, rows)) for each, (rows, _) in sides]
        both = (other, (block_m, block_n)), (found, (block_m, block_n)), (found, (block_n, block_m))
        tiles = tuple(described_by(*each) for each in (*sides, *both))
    launch(
        "symmetric",
        (-(-m // block_m) * -(-m // block_n), b, 1),
        (left, right, added, factors, found, *tiles),
        (m, k, left.stride(1), left.stride(2)),
        (alpha, beta, diagonal),
        FACTOR=left.dtype,
        ADDED=added is not None,
        SCALED=factors is not None,
        DESCRIBED=described,
        TRANSPOSED=transposed,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return found


def _describable(matrices: Tensor) -> bool:
    """Whether the tensor memory accelerator reads and writes tiles of matrices ``(b, m, k)`` and their products."""
    _, m, k = matrices.shape
    size = matrices.element_size()
    whole = not (m * size % 16 or k * size % 16 or matrices.data_ptr() % 16)
    return whole and _has_accelerator(matrices.device)


@cache
def _has_accelerator(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0))
