"""Newton-Schulz by :mod:`lightning_adapm.step.triton_orthogonal`, as in :mod:`lightning_adapm.moments.orthogonal`.

Half of each symmetric product is computed. Few steps are multiplied in float16 where the Gram form is cheaper, and long
ones always: it has three bits more than bfloat16, so that the Gram form needs no restart.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_adapm.moments.orthogonal import Iteration, Step, constant_of, parts_of, squares_of
from lightning_adapm.step import kernels
from lightning_adapm.step.launch import described_by, launch

SYMMETRIC, LARGE_SYMMETRIC, SMALL_SYMMETRIC = (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (128, 128, 32, 8, 4)
"""Rows, columns and depth of a tile, warps, stages: of square matrices, of longer or large ones, and of both within the
99 KiB of shared memory that a block has on smaller GPUs. Columns are once or twice the rows. The fastest of some on an
H100.
"""
_LARGE = 2048
"""Rows of products whose tiles are so many that larger ones leave few multiprocessors without work."""
_RESCALED = 4096
"""Elements of a tile."""

NORM, _GRAM = 64.0, 256.0
"""Factors of a matrix and of its first Gram matrix in float16, where smaller ones would lose bits."""
_LEAST_NORM = NORM / 256
"""Least norm that is divided out, where gradient and momentum cancel: polynomials that make up for less overflow."""
_MOST_SQUARE = 5 / 3
"""Columns for each row, in the shape with more of them, up to which long steps take less work in the plain form."""
_MOST_SLOPE = 320.0
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


def is_half(shape: Sequence[int], dtype: torch.dtype, iteration: Iteration) -> bool:
    """Whether matrices of a ``shape`` ``(..., m, n)``, whose products have a ``dtype``, are multiplied in float16
    instead, by :func:`iterated_in_half`.
    """
    steps, (m, n) = len(iteration.steps), sorted(shape[-2:])
    if dtype != torch.bfloat16 or steps < 2 or prod(map(constant_of, iteration.steps)) > _MOST_SLOPE:
        return False
    if _are_long(iteration.steps):
        return True
    squares = 0.5 * (3 * steps - 2 + steps // 2) + (steps - 1) // 2  # products of m x m matrices, halves first
    return 1.5 * n + squares * m < steps * (1.5 * n + 0.5 * m)


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


def iterated_in_half(found: Tensor, iteration: Iteration, squares: Tensor | None = None) -> Tensor:
    """Iterate on matrices ``(b, m, n)`` in float16 by one Gram matrix. ``found`` may be overwritten.

    Their norms are :data:`NORM` or 0; or, of about that size, the roots of ``squares`` ``(b,)``. The results have the
    scale of :func:`iterated`'s. What the Gram matrix loses to float16 is as large as its small eigenvalues, and added
    again when the first step has made them larger. Matrices of a norm below :data:`_LEAST_NORM` give results that are
    as much smaller.
    """
    if not found.numel():
        return found
    if squares is None:
        inverse = found.new_full(found.shape[:1], 1 / NORM, dtype=torch.float32)
    else:
        inverse = squares.clamp_min(_LEAST_NORM**2).rsqrt_()
    if _are_long(iteration.steps):
        return _in_long_steps(found, iteration.steps, inverse)
    return _multiplied(found, _of_all_steps(_rows(found), iteration, inverse))


def _are_long(steps: Sequence[Step]) -> bool:
    return any(len(squares_of(step)) > 1 for step in steps)


def _in_long_steps(found: Tensor, steps: Sequence[Step], inverse: Tensor) -> Tensor:
    """:func:`iterated_in_half` in two long steps, in the form with less work, given the ``inverse`` norms ``(b,)``.

    The polynomial of a long step is further from one of the Gram matrix than that of a short one. So what the Gram form
    multiplies by it is not taken for symmetric, but for the next Gram matrix, whatever it is.
    """
    first, second = steps
    rows = _rows(found)
    b, m, n = rows.shape
    lost = rows.new_empty(b, m, m) if n > _MOST_SQUARE * m else None
    gram = symmetric(rows, rows, alpha=_GRAM, factors=inverse, powers=(2, 0, 0, 0), lost=lost)
    root = _inverse_in_half(gram).sqrt()
    if lost is None:
        # of a norm of NORM: the rest of its inverse, which is near 1, follows where it is squared or at last
        other, rest = _multiplied(found, _polynomial(gram, first, root, 2, 1, _GRAM**0.5 / NORM)), inverse * NORM
        rows = _rows(other)
        gram = symmetric(rows, rows, factors=rest, powers=(2, 0, 0, 0), out=gram)
        return _multiplied(other, _polynomial(gram, second, rest, 0, 1), found)
    polynomial = _polynomial(gram, first, root, 2)
    turned = torch.baddbmm(lost, polynomial, gram, beta=constant_of(first))
    del lost
    gram = symmetric(turned, polynomial, factors=root, powers=(2, 0, 0, 0), out=gram)
    del turned
    return _multiplied(found, torch.bmm(_polynomial(gram, second, root * inverse, 0, 1, _GRAM**0.5), polynomial))


def _of_all_steps(rows: Tensor, iteration: Iteration, inverse: Tensor) -> Tensor:
    """Product of all steps, of matrices with these ``inverse`` norms ``(b,)``."""
    gram, polynomial, of_gram = _of_first_step(rows, iteration, inverse)
    return _of_later_steps(gram, polynomial, (_GRAM * of_gram).sqrt() * inverse, iteration.steps)


def _of_first_step(rows: Tensor, iteration: Iteration, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second Gram matrix, the first step's polynomial but for its constant, and the factors ``(b,)`` by which the
    first Gram matrix, of matrices with these inverse ``norms`` ``(b,)``, is smaller in the iteration.
    """
    lost = rows.new_empty(len(rows), rows.shape[1], rows.shape[1])
    gram = symmetric(rows, rows, alpha=_GRAM, factors=norms, powers=(2, 0, 0, 0), lost=lost)
    inverse = (
        _inverse_in_half(gram) if iteration.by_gram else gram.new_full(gram.shape[:1], 1 / _GRAM, dtype=torch.float32)
    )
    ((a, b, c),) = squares_of(iteration.steps[0])
    polynomial = symmetric(gram, gram, gram, c, b, factors=inverse, powers=(2, 1, 0, 0))
    turned = symmetric(polynomial, gram, gram, _GRAM, a * _GRAM, factors=inverse)
    again: dict[str, Any] = {"other": lost, "gamma": a * a, "factors": inverse, "powers": (0, 0, 1, 0)}
    return symmetric(polynomial, turned, turned, 1 / _GRAM, a / _GRAM, out=gram, **again), polynomial, inverse


def _of_later_steps(gram: Tensor, waiting: Tensor | None, factors: Tensor, steps: Sequence[Step]) -> Tensor:
    """Product of all steps and of ``factors`` ``(b,)``, given what :func:`_of_first_step` has found.

    Two steps next to each other are multiplied as if their product were symmetric. More are not: where singular values
    have grown much, the rounding of a later step would be multiplied by that.
    """
    product: Tensor | None = None
    scaled: dict[str, Any] = {"factors": factors, "powers": (1, 1, 1, 1)}
    for number, step in enumerate(steps[1:], 2):
        ((a, b, c),) = squares_of(step)
        polynomial, before = symmetric(gram, gram, gram, c, b), constant_of(steps[number - 2])
        if number < len(steps):
            turned = symmetric(polynomial, gram, gram, beta=a)
            gram = symmetric(polynomial, turned, turned, beta=a, out=gram)
            del turned
        if waiting is None:
            waiting = polynomial
            continue
        both: dict[str, Any] = {"other": polynomial, "gamma": before, **scaled}
        pair = symmetric(polynomial, waiting, waiting, 1.0, a, a * before, **both)
        waiting, scaled = None, {}
        del polynomial, both
        product = pair if product is None else torch.bmm(pair, product)
    assert product is not None
    return product if waiting is None else torch.baddbmm(product, waiting, product, beta=constant_of(steps[-1]))


def _divided(gram: Tensor) -> Tensor:
    """Divide Gram matrices ``(b, m, m)`` by their norms; return the factors ``(b,)`` of their matrices."""
    inverse = _inverse(gram)
    rescale(gram, inverse)
    return inverse.sqrt()


def _inverse(gram: Tensor) -> Tensor:
    """Inverse norms of Gram matrices ``(b, m, m)``, 1 for those that are zero."""
    size = torch.linalg.vector_norm(gram, dim=(-2, -1), dtype=torch.float32)
    return torch.where(size > 0, size, 1.0).reciprocal()


def _inverse_in_half(gram: Tensor) -> Tensor:
    """Inverse norms of Gram matrices of matrices of norm 1, times :data:`_GRAM`; no larger for smaller matrices."""
    least = 0.5 * _GRAM / gram.shape[-1] ** 0.5  # half of what the Gram matrix of a norm of 1 has at least
    return torch.linalg.vector_norm(gram, dim=(-2, -1), dtype=torch.float32).clamp_min(least).reciprocal()


def _rows(found: Tensor) -> Tensor:
    """Matrices by whose rows Gram matrices are smaller."""
    return found if found.shape[-2] <= found.shape[-1] else found.mT


def _multiplied(found: Tensor, product: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrices by whose rows they are smaller, times the ``product`` from the left."""
    return torch.bmm(*(product, found) if found.shape[-2] <= found.shape[-1] else (found, product.mT), out=out)


def _product(gram: Tensor, steps: Sequence[Step], factors: Tensor | None) -> Tensor:
    """Matrix that stands for several steps, computed from the Gram matrix, times each matrix's own of ``factors``."""
    product = polynomial = _polynomial(gram, steps[0], factors if len(steps) == 1 else None, of_all=1)
    for number, step in enumerate(steps[1:], 2):
        gram = symmetric(polynomial, symmetric(polynomial, gram))  # the matrix's next Gram matrix
        polynomial = _polynomial(gram, step)
        product = symmetric(polynomial, product, factors=factors if number == len(steps) else None)
    return product


def _polynomial(
    gram: Tensor, step: Step, factors: Tensor | None = None, of_gram: int = 0, of_all: int = 0, scale: float = 1.0
) -> Tensor:
    """A step's polynomial, ``a I + b S + c S²`` of a short one, times ``scale`` and the power ``of_all`` of ``factors``
    ``(b,)``, of Gram matrices times their power ``of_gram``.

    The rounding of ``a`` on the diagonal costs no more than that of the products: where it stands in all of them alike,
    it changes the polynomial a little, and no Gram matrix loses its small eigenvalues.
    """
    *before, (a, b, c) = squares_of(step)
    found, of_first = gram, 2 * of_gram
    for identity, once, squared in before:
        powers = of_first, of_gram, 0, 0
        found, of_first = symmetric(found, found, gram, squared, once, identity, factors=factors, powers=powers), 0
    powers = of_first + of_all, of_gram + of_all, 0, of_all
    return symmetric(found, found, gram, scale * c, scale * b, scale * a, factors=factors, powers=powers)


def symmetric(
    left: Tensor,
    right: Tensor,
    added: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.0,
    diagonal: float = 0.0,
    *,
    other: Tensor | None = None,
    gamma: float = 0.0,
    factors: Tensor | None = None,
    powers: tuple[int, int, int, int] = (1, 1, 0, 1),
    out: Tensor | None = None,
    lost: Tensor | None = None,
) -> Tensor:
    """``alpha left rightᵀ + beta added + gamma other + diagonal I``, ``(b, m, m)``, where that is symmetric.

    Args:
        left: Matrices ``(b, m, k)``, or transposed ones.
        right: Matrices with the same strides. Those that are symmetric need not be transposed.
        added: Symmetric matrices ``(b, m, m)``.
        alpha: Factor of the product.
        beta: Factor of what is added.
        diagonal: Number that is added on the diagonal.
        other: Matrices ``(b, m, m)`` that are added below the diagonal, and mirrored.
        gamma: Factor of those.
        factors: Numbers ``(b,)`` in float32.
        powers: Powers of ``factors`` that multiply the product; what is added; the other; and the diagonal.
        out: Where the result is written, none of the operands.
        lost: Where the result's rounding is written.
    """
    b, m, k = left.shape
    found = left.new_empty(b, m, m) if out is None else out
    described, tile = _describable(left), SMALL_SYMMETRIC
    if kernels.has_large_blocks(left.device):
        tile = LARGE_SYMMETRIC if k > m or (described and m >= _LARGE) else SYMMETRIC
    block_m, block_n, block_k, warps, stages = tile
    product_power, added_power, other_power, diagonal_power = (0,) * 4 if factors is None else powers
    across, transposed = -(-m // block_n), left.stride(-1) != 1
    tiles: tuple[Any, ...] = (None,) * 5
    if described:
        sides = [(each, (rows, block_k)) for each, rows in ((left, block_m), (right, block_n))]
        if transposed:
            sides = [(each.mT, (block_k, rows)) for each, (rows, _) in sides]
        others = [(found if added is None else added, (block_m, block_n))]
        others += [(each, (block_m, block_m)) for each in (found, found if lost is None else lost)]
        tiles = tuple(described_by(*each) for each in (*sides, *others))
    launch(
        "symmetric",
        (across * (across + 1) // 2 * (block_n // block_m), b, 1),
        (left, right, added, other, factors, found, lost, *tiles),
        (m, k, left.stride(1), left.stride(2)),
        (alpha, beta, gamma, diagonal),
        FACTOR=left.dtype,
        ADDED=added is not None,
        OTHER=other is not None,
        LOST=lost is not None,
        PRODUCT_POWER=product_power,
        ADDED_POWER=added_power,
        OTHER_POWER=other_power,
        DIAGONAL_POWER=diagonal_power,
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
    return whole and kernels.has_accelerator(matrices.device)
