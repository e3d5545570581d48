"""Newton-Schulz by :mod:`lightning_adapm.step.triton_orthogonal`, as in :mod:`lightning_adapm.moments.orthogonal`.

All products but those with the matrix itself are symmetric, and half of each is computed. Few steps are multiplied in
float16 where the Gram form is cheaper: it has three bits more than bfloat16, so that they need no restart.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.orthogonal import Coefficients, Iteration, parts_of
from lightning_adapm.step import kernels
from lightning_adapm.step.launch import described_by, launch

SYMMETRIC, LARGE_SYMMETRIC, SMALL_SYMMETRIC = (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 128, 32, 8, 4)
"""Rows, columns and depth of a tile, warps, stages: of square matrices, of longer or large ones, and of both within the
99 KiB of shared memory that a block has on smaller GPUs. Columns are a multiple of rows. The fastest of some on an
H100.
"""
_LARGE = 2048
"""Rows of products whose tiles are so many that larger ones leave few multiprocessors without work."""
_RESCALED = 4096
"""Elements of a tile."""

NORM, _GRAM = 64.0, 256.0
"""Factors of a matrix and of its first Gram matrix in float16, where smaller ones would lose bits."""
_MOST_SLOPE = 150.0
"""Most growth of the smallest singular values in float16 without a restart. Rounding grows by its square."""


def rescale(found: Tensor, factors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Multiply each of ``b`` matrices by its own of ``factors`` ``(b,)``, in place, also into a ``dtype`` as large."""
    numel, result = found.shape[1:].numel(), found.view(dtype or found.dtype)
    launch(
        "rescale",
        (-(-numel // _RESCALED), len(found), 1),
        (found, result, factors),
        (numel,),
        (),
        FACTOR=found.dtype,
        RESULT=result.dtype,
        BLOCK=_RESCALED,
    )
    return result


def is_half(found: Tensor, iteration: Iteration) -> bool:
    """Whether matrices ``(b, m, n)`` are multiplied in float16, by :func:`iterated_in_half`."""
    steps, (m, n) = len(iteration.steps), sorted(found.shape[-2:])
    if found.dtype != torch.bfloat16 or steps < 2 or prod(a for a, _, _ in iteration.steps) > _MOST_SLOPE:
        return False
    return 1.5 * n + (2 * steps - 1.5) * m < steps * (1.5 * n + 0.5 * m)


def iterated(found: Tensor, iteration: Iteration, inverse: Tensor | None = None) -> Tensor:
    """Iterate on matrices ``(b, m, n)`` of norm 1 or 0, or on others times the ``inverse`` ``(b,)`` of their norms.

    The form with less work is that of torch's operations, because a symmetric product takes as long as all of it there.
    ``found`` is overwritten: matrices are multiplied from one memory to another and back.
    """
    if not found.numel():
        return found
    other, by_gram = None, iteration.by_gram
    for steps in parts_of(found.shape, found.dtype, iteration.steps):
        rows = _rows(found)
        gram = symmetric(rows, rows, factors=None if inverse is None else inverse.square())
        if by_gram:
            divided = _divided(gram)
            inverse, by_gram = divided if inverse is None else inverse * divided, False
        found, other = _multiplied(found, _product(gram, steps, inverse), other), found
        inverse = None
    return found


def iterated_in_half(found: Tensor, iteration: Iteration) -> Tensor:
    """Iterate on matrices ``(b, m, n)`` in float16, whose norms are :data:`NORM` or 0, by one Gram matrix.

    The results have the scale of :func:`iterated`'s.
    """
    if not found.numel():
        return found
    rows = _rows(found)
    gram, scale, product = symmetric(rows, rows, alpha=_GRAM / NORM**2), _GRAM, None
    inverse = _divided(gram, _GRAM) / NORM if iteration.by_gram else None
    last = 1.0 if iteration.by_gram else 1 / NORM
    for number, (a, b, c) in enumerate(iteration.steps, 1):
        polynomial = symmetric(gram, gram, gram, c / scale**2, b / scale)  # the a is added elsewhere, in float32
        if product is None:
            product = polynomial.clone()
            product.diagonal(dim1=-2, dim2=-1).add_(a)
        elif number < len(iteration.steps):
            product = symmetric(polynomial, product, product, beta=a)
        else:
            product = symmetric(polynomial, product, product, last, a * last, factors=inverse)
        if number < len(iteration.steps):
            turned = symmetric(polynomial, gram, gram, beta=a)
            gram = symmetric(polynomial, turned, turned, 1 / scale, a / scale, out=gram)
            scale = 1.0
    assert product is not None
    return _multiplied(found, product)


def _divided(gram: Tensor, scale: float = 1.0) -> Tensor:
    """Divide Gram matrices ``(b, m, m)`` by their norms, but for a ``scale`` that they have; return what their matrices
    are to be multiplied by, ``(b,)``.
    """
    size = torch.linalg.vector_norm(gram, dim=(-2, -1), dtype=torch.float32) / scale
    inverse = torch.where(size > 0, size, 1.0).reciprocal()
    rescale(gram, inverse)
    return inverse.sqrt()


def _rows(found: Tensor) -> Tensor:
    """Matrices by whose rows Gram matrices are smaller."""
    return found if found.shape[-2] <= found.shape[-1] else found.mT


def _multiplied(found: Tensor, product: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.bmm(*(product, found) if found.shape[-2] <= found.shape[-1] else (found, product), out=out)


def _product(gram: Tensor, steps: Sequence[Coefficients], factors: Tensor | None) -> Tensor:
    """Matrix that stands for several steps, computed from the Gram matrix, times each matrix's own of ``factors``."""
    product = polynomial = _polynomial(gram, steps[0], factors if len(steps) == 1 else None)
    for number, step in enumerate(steps[1:], 2):
        gram = symmetric(polynomial, symmetric(polynomial, gram))  # the matrix's next Gram matrix
        polynomial = _polynomial(gram, step)
        product = symmetric(polynomial, product, factors=factors if number == len(steps) else None)
    return product


def _polynomial(gram: Tensor, step: Coefficients, factors: Tensor | None = None) -> Tensor:
    """Compute ``a I + b S + c S²``.

    The rounding of ``a`` on the diagonal costs no more than that of the products: where it stands in all of them alike,
    it changes the polynomial a little, and no Gram matrix loses its small eigenvalues.
    """
    a, b, c = step
    return symmetric(gram, gram, gram, c, b, a, factors)


def symmetric(
    left: Tensor,
    right: Tensor,
    added: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    diagonal: float = 0.0,
    factors: Tensor | None = None,
    out: Tensor | None = None,
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
        out: Where the result is written, none of the operands.
    """
    b, m, k = left.shape
    found = left.new_empty(b, m, m) if out is None else out
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
