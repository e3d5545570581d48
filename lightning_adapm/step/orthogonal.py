"""Orthogonal updates by :mod:`lightning_adapm.step.triton_orthogonal`, as :mod:`lightning_adapm.moments.orthogonal`.

The direction is written once, in the dtype of products. Newton-Schulz then has the Gram form for every shape: all its
products but the last are symmetric, and computing half of each is less work than the plain form for square matrices.
"""

from functools import cache

import torch
from torch import Tensor

from lightning_adapm.moments.base import Direction, split
from lightning_adapm.moments.orthogonal import COEFFICIENTS, gram_parts, sized
from lightning_adapm.sharding.owners import Owners
from lightning_adapm.sharding.reduction import ProcessReduction, Reduction
from lightning_adapm.step import kernels
from lightning_adapm.step.launch import Matrices, launch

DIRECT, DIRECT_ALONG = (16, 128, 4, 3), (64, 64, 4, 4)
"""Rows and columns of a tile, warps, stages: without a product of factors and with it."""
SYMMETRIC, DEEP_SYMMETRIC, SMALL_SYMMETRIC = (128, 128, 64, 8, 4), (128, 256, 64, 8, 3), (128, 128, 64, 8, 3)
"""Rows, columns and depth of a tile, warps, stages: of square matrices, of longer ones, and of both within the 99 KiB
of shared memory that a block has on smaller GPUs. Columns are a multiple of rows. The fastest of some on an H100.
"""
_RESCALED = 4096
"""Elements of a tile."""


def direct(
    grads: Matrices,
    flaws: Tensor,
    average: kernels.Average | None,
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
    found = grads.like.new_empty((b, m, n), dtype=kernels.FACTOR)
    block_m, block_n, warps, stages = DIRECT if factors is None else DIRECT_ALONG
    grid = -(-m // block_m), -(-n // block_n), b
    sizes = grads.like.new_empty((b, 2, grid[0] * grid[1]), dtype=torch.float32)
    known = [grads, *([] if average is None else [average.values]), *([] if factors is None else [factors[1]])]
    launch(
        "direct",
        grid,
        (
            grads.table,
            grads.table if average is None else average.values.table,
            found if factors is None else factors[0],
            grads.table if factors is None else factors[1].table,
            flaws,
            found,
            sizes,
        ),
        (
            m,
            n,
            0 if factors is None else factors[1].like.shape[-2],
            0 if factors is None else factors[0].shape[-1],
            grads.stride,
            b // len(flaws),
        ),
        (0.0 if average is None else average.beta1, share),
        GRAD=grads.like.dtype,
        AVERAGE=(grads if average is None else average.values).like.dtype,
        RIGHT=(grads if factors is None else factors[1]).like.dtype,
        FACTOR=kernels.FACTOR,
        ALIGNED=all(matrices.aligned for matrices in known),
        AVERAGED=average is not None,
        FACTORS=factors is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=32,
        num_warps=warps,
        num_stages=stages,
    )
    largest, shares = sizes.double().unbind(dim=1)
    return found, (largest.square() * shares).sum(dim=-1)


def updates(found: Tensor, squares: Tensor, steps: int, like: list[Tensor], reduction: Reduction) -> Direction:
    """Updates along directions.

    Args:
        found: Directions ``(b, m, n)`` in the dtype of products, which are overwritten. Of shards, the rows of this
            process; no row is cut.
        squares: Their squared norms ``(b,)`` in float64.
        steps: Number of steps of Newton-Schulz.
        like: Matrices and stacks of them, one for each part.
        reduction: Completion of sums over rows.
    """
    norms = torch.stack(reduction.total(list(squares.unbind()))).sqrt()
    possible = norms.isfinite() & (norms > torch.finfo(torch.float32).tiny)
    _rescale(found, torch.where(possible, 1 / norms, 0.0).float())
    if not isinstance(reduction, ProcessReduction):
        return sized(split(iterated(found, steps), like), found.shape[-2])
    owned = Owners(reduction.shards).apply(lambda whole: iterated(whole, steps), list(found.unbind()))
    return sized(owned, reduction.shards[0].size)


def _rescale(found: Tensor, factors: Tensor) -> None:
    """Multiply each of ``b`` matrices by its own of ``factors`` ``(b,)``."""
    numel = found[0].numel()
    launch(
        "rescale",
        (-(-numel // _RESCALED), len(found), 1),
        (found, factors),
        (numel,),
        (),
        FACTOR=found.dtype,
        BLOCK=_RESCALED,
    )


def iterated(found: Tensor, steps: int) -> Tensor:
    """Iterate on matrices ``(b, m, n)`` of norm 1 or 0."""
    a, b, c = COEFFICIENTS
    wide = found.shape[-2] <= found.shape[-1]
    for number in gram_parts(steps, found.dtype):
        gram = symmetric(found, found, None) if wide else symmetric(found.mT, found.mT, None)
        polynomial = symmetric(gram, gram, gram, alpha=c, beta=b)
        product = polynomial.clone()
        product.diagonal(dim1=-2, dim2=-1).add_(a)
        for _ in range(number - 1):
            # the matrix's next Gram matrix: (a + p) S (a + p)
            gram = symmetric(polynomial, gram, gram, beta=a)
            gram = symmetric(polynomial, gram, gram, beta=a)
            polynomial = symmetric(gram, gram, gram, alpha=c, beta=b)
            product = symmetric(polynomial, product, product, beta=a)
        found = product @ found if wide else found @ product
    return found


@cache
def _is_large(device: torch.device) -> bool:
    """Whether a block has the shared memory of a data center's GPU."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0))


def symmetric(left: Tensor, right: Tensor, added: Tensor | None, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """``alpha left rightᵀ + beta added``, ``(b, m, m)``, where that is symmetric.

    Args:
        left: Matrices ``(b, m, k)``, or transposed ones.
        right: Matrices with the same strides. Those that are symmetric need not be transposed.
        added: Symmetric matrices ``(b, m, m)``.
        alpha: Factor of the product.
        beta: Factor of what is added.
    """
    b, m, k = left.shape
    found = left.new_empty(b, m, m)
    tile = SMALL_SYMMETRIC
    if _is_large(left.device):
        tile = DEEP_SYMMETRIC if k > m else SYMMETRIC
    block_m, block_n, block_k, warps, stages = tile
    launch(
        "symmetric",
        (-(-m // block_m) * -(-m // block_n), b, 1),
        (left, right, found if added is None else added, found),
        (m, k, left.stride(1), left.stride(2)),
        (alpha, beta),
        FACTOR=left.dtype,
        ADDED=added is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=stages,
    )
    return found
