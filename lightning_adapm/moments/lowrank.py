"""Pure mathematics of a low-rank momentum: a basis, its refresh, and factors in other bases and of other ranks.

Shapes throughout: ``b`` matrices at a time, each ``m x n`` (``n`` is the stored last dimension), rank ``r``.
``grad`` is ``(b, m, n)``, ``left`` is ``(b, m, r)``, ``right`` is ``(b, r, n)`` with orthonormal rows. A row is zero
until a gradient has shown its direction. No function here reads a value back from the device.

Source: AdaPM, arXiv 2510.09103, Algorithms 1 to 3 (low-rank momentum with residual correction, warm-started factors).
"""

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_adapm.moments.cache import kept
from lightning_adapm.sharding.find import has_values
from lightning_adapm.sharding.reduction import ONE_PROCESS, Reduction

# A direction is noise if its part independent of the others is below this share of its length.
_DEPENDENT = 1e-5
_SOLVED_TOGETHER, _MOST_SOLVED = 9, 64
"""Minimum number of triangular matrices that a GPU inverts together, because torch inverts fewer of them one by one,
and maximum number of rows of each.
"""
_ALIGNED = 8
"""Multiple to which many rows in float64 are padded; otherwise their products take an H100 a quarter longer."""


def starting_rows(rank: int, n: int, like: Tensor, columns: slice = slice(None)) -> Tensor:
    """Make the fixed, well-mixed ``(rank, n)`` matrix with entries in [-1, 1) that a first refresh starts from, or some
    ``columns`` of it.

    It is an integer hash of its two arguments, equal on every device and process. Fused and separate weights, and all
    processes of a group, therefore start from the same subspace without any exchange.
    """
    first, last, _ = columns.indices(n)
    bits = torch.arange(1, rank * n + 1, n, device=like.device)[:, None] + torch.arange(first, last, device=like.device)
    for shift, multiplier in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
        bits = ((bits ^ (bits >> shift)) * multiplier) & 0xFFFFFFFF
    # through 24 bits, which float32 holds exactly: not every device has float64
    return (bits >> 8).to(like.dtype) / 2**23 - 1


def kept_starting_rows(rank: int, n: int, like: Tensor) -> Tensor:
    """:func:`starting_rows`, kept by the optimizer whose step runs."""
    make = partial(starting_rows, rank, n, like.new_empty(()))
    lasting = has_values(like) and not torch.compiler.is_compiling()  # of FakeTensorMode, none is of later use
    return kept((rank, n, like.dtype, like.device), make) if lasting else make()


def orthonormal_rows(rows: Tensor) -> Tensor:
    """Make the rows of ``rows`` ``(b, r, n)`` orthonormal; a row that depends on earlier ones becomes zero."""
    return orthonormalize([rows])[0][0]


def orthonormalize(stacks: Sequence[Tensor], reduction: Reduction = ONE_PROCESS) -> tuple[list[Tensor], Tensor]:
    """Apply :func:`orthonormal_rows` to several ``stacks`` of any shapes, and factorize their small matrices together.

    Also return for each matrix of all stacks whether it is finite, ``(sum of b, 1, 1)``; results of others are
    meaningless.
    Processes that share the columns of bases do the work for their own columns, ``r²n / N`` instead of ``r²n``.

    Cholesky-QR, twice, in float64 (never TF32): the first pass is shifted so that it cannot fail and shows which rows
    are dependent, the second makes the others orthonormal to working precision. Only ``r x r`` matrices are factorized,
    and a column in which every row is zero stays exactly zero, which a Householder QR does not give.
    """
    rows = [_in_float64(reduction.kept_columns(stack)) for stack in stacks]
    gram = reduction.over_columns(_gram(rows))
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    longest = length.amax(dim=-1, keepdim=True)
    seen = length > _DEPENDENT * longest
    _multiply(_whitening(gram, torch.where(seen, length.reciprocal(), 0.0), _DEPENDENT**2), rows)
    gram = reduction.over_columns(_gram(rows))
    alive = (gram.diagonal(dim1=-2, dim2=-1) > 0.25).to(gram.dtype)
    _multiply(_whitening(gram, alive, 1 - alive), rows, stacks)
    return reduction.columns_of(rows, [stack.shape[-1] for stack in stacks]), longest.isfinite()[..., None]


def _in_float64(rows: Tensor) -> Tensor:
    """Copy to float64, ``(b, r, n)``; many rows are padded with zeros."""
    b, r, n = rows.shape
    missing = -r % _ALIGNED if r > _MOST_SOLVED else 0
    if not missing:
        return rows.to(torch.float64)
    copied = rows.new_zeros((b, r + missing, n), dtype=torch.float64)
    copied[:, :r] = rows
    return copied


def _gram(stacks: Sequence[Tensor]) -> Tensor:
    """Compute ``rows rowsᵀ`` of every stack, padded with zeros to the largest number of rows."""
    if len(stacks) == 1:
        return stacks[0] @ stacks[0].mT
    most = max(stack.shape[-2] for stack in stacks)
    grams = stacks[0].new_zeros((sum(map(len, stacks)), most, most))
    for gram, stack in zip(_parts(grams, stacks), stacks, strict=True):
        torch.bmm(stack, stack.mT, out=gram[:, : stack.shape[-2], : stack.shape[-2]])
    return grams


def _parts(squares: Tensor, stacks: Sequence[Tensor]) -> Sequence[Tensor]:
    """The matrices of each of the stacks."""
    return squares.split([len(stack) for stack in stacks])


def _multiply(weights: Tensor, stacks: list[Tensor], like: Sequence[Tensor] = ()) -> None:
    """Multiply each stack by its part of ``weights`` from the left, in place.

    Stacks are multiplied one after another, so that only one of them is held twice. With ``like``, the products have
    the numbers of rows and the dtypes of those tensors.
    """
    for place, part in enumerate(_parts(weights, stacks)):
        stack = stacks[place]
        found = like[place] if like else stack
        stacks[place] = (part[:, : found.shape[-2], : stack.shape[-2]] @ stack).to(found.dtype)


def _whitening(gram: Tensor, scale: Tensor, shift: Tensor | float) -> Tensor:
    """``chol(scale gram scale + shift)⁻¹ scale`` with the diagonal matrices ``scale`` and ``shift``, ``(b, r)``."""
    gram = gram * (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    gram.diagonal(dim1=-2, dim2=-1).add_(shift)
    factor, _ = torch.linalg.cholesky_ex(gram)  # the variant that reports failure on the device
    del gram
    return inverted(factor).mul_(scale.unsqueeze(-2))


def inverted(lower: Tensor) -> Tensor:
    """Invert lower triangular matrices ``(b, r, r)``: blocks on the diagonal, which products put together.

    Solving for all rows at once takes an H100 1 ms for 205 rows, however few matrices there are.
    """
    b, r = len(lower), lower.shape[-1]
    if r <= _MOST_SOLVED:
        if lower.is_cuda and b < _SOLVED_TOGETHER:
            lower = pad(lower, (0, 0, 0, 0, 0, _SOLVED_TOGETHER - b), value=1.0)
        one = torch.eye(r, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, one.expand_as(lower), upper=False)[:b]
    half = -(-r // 2)
    if r % 2:
        lower = pad(lower, (0, 1, 0, 1))
        lower[:, -1, -1] = 1.0
    first, last = inverted(torch.cat([lower[:, :half, :half], lower[:, half:, half:]])).chunk(2)
    below = last @ lower[:, half:, :half]
    del lower
    inverse = below.new_zeros((b, 2 * half, 2 * half))
    inverse[:, :half, :half], inverse[:, half:, half:] = first, last
    torch.baddbmm(below, below, first, beta=0, alpha=-1, out=inverse[:, half:, :half])
    return inverse[:, :r, :r]


class Multiplied(Protocol):
    """A batch of ``b`` matrices ``m x n`` that is only multiplied: a tensor, or an object in its place."""

    def __matmul__(self, columns: Tensor, /) -> Tensor: ...

    def __rmatmul__(self, weights: Tensor, /) -> Tensor: ...


def refresh_basis(
    grad: Multiplied, left: Tensor, right: Tensor, beta1: float, reduction: Reduction = ONE_PROCESS
) -> Tensor:
    """Find the next basis by one warm-started subspace iteration on ``M~ = beta1 left right + (1 - beta1) grad``.

    The result is ``orth((M~ᵀ M~ rightᵀ)ᵀ)``, without forming ``M~``. Directions that are still zero are sketched with
    :func:`starting_rows`. The old basis stays where the gradient is zero or the products are not finite, which is
    decided on the device.

    ``grad`` and ``left`` may be the rows of this process. ``reduction`` then adds those of the others, so that all of
    them find the same basis.
    """
    return refreshed([(*iterated_rows(grad, left, right, beta1, reduction), right)], reduction)[0]


def refreshed(iterated: Sequence[tuple[Tensor, Tensor, Tensor]], reduction: Reduction = ONE_PROCESS) -> list[Tensor]:
    """Find the next bases from the results of :func:`iterated_rows` and the old bases."""
    bases, finite = orthonormalize([rows for rows, _, _ in iterated], reduction)
    flags = finite.split([len(rows) for rows, _, _ in iterated])
    found = zip(iterated, bases, flags, strict=True)
    return [torch.where(shown & flag, basis, right) for (_, shown, right), basis, flag in found]


def iterated_rows(
    grad: Multiplied, left: Tensor, right: Tensor, beta1: float, reduction: Reduction = ONE_PROCESS
) -> tuple[Tensor, Tensor]:
    """Compute the rows that :func:`refresh_basis` makes orthonormal, ``(M~ᵀ M~ rightᵀ)ᵀ``.

    For directions that are still zero, ``M~`` is the gradient alone.

    Returns:
        The rows ``(b, r, n)``, and whether each gradient has an entry that is not zero, ``(b, 1, 1)``.
    """
    projected = grad @ sketched(right).mT
    reduction.rows(projected)
    # in place: of a table of tokens, each of these is as large as the state. left right rightᵀ is left, because rows of
    # the basis are orthonormal
    seen = torch.lerp(left, projected, 1 - beta1, out=projected)
    # Columns of unit length: keeps gradients of any scale inside float32 and the next product well conditioned.
    length = reduction.length(seen).clamp_min(torch.finfo(seen.dtype).tiny)
    seen.mul_(length.reciprocal().to(seen.dtype))
    fresh, inner = reduction.total([seen.mT @ grad, reduction.owned(seen).mT @ left])
    rows = torch.baddbmm(fresh, inner, right, beta=1 - beta1, alpha=beta1)
    return rows, any_nonzero(fresh)


def sketched(right: Tensor) -> Tensor:
    """Put :func:`starting_rows` in the place of directions of ``right`` that are still zero."""
    rank, n = right.shape[-2:]
    return torch.where(right.any(dim=-1, keepdim=True), right, kept_starting_rows(rank, n, right))


def any_nonzero(matrices: Tensor) -> Tensor:
    """Whether each of ``b`` matrices has an entry that is not zero, ``(b, 1, 1)``."""
    return matrices.any(dim=-1, keepdim=True).any(dim=-2, keepdim=True)


def move_left(left: Tensor, right: Tensor, new_right: Tensor) -> Tensor:
    """Express ``left`` in another basis: ``left right new_rightᵀ``, the momentum within the new subspace."""
    return left @ (right @ new_right.mT)


def are_factors(left: Tensor, right: Tensor, shape: torch.Size) -> bool:
    """Whether the shapes of two tensors are those of factors, of any rank, of a matrix or stack of ``shape``."""
    *batch, m, n = shape if len(shape) >= 2 else (-1, -1)
    rank = right.shape[-2] if right.dim() >= 2 else -1
    return left.shape == (*batch, m, rank) and right.shape == (*batch, rank, n)


def factorized(dense: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factorize matrices by three subspace iterations, to factors ``(..., m, rank)`` and ``(..., rank, n)``."""
    dtype = torch.float64 if dense.dtype == torch.float64 else torch.float32
    batch = dense.to(dtype).reshape(-1, *dense.shape[-2:])
    m, n = dense.shape[-2:]
    if rank == n:
        return dense, torch.eye(n, dtype=dtype, device=dense.device).expand(*dense.shape[:-2], n, n)
    basis, nothing = batch.new_zeros(len(batch), rank, n), batch.new_zeros(len(batch), m, rank)
    for _ in range(3):
        basis = refresh_basis(batch, nothing, basis, beta1=0.0)
    return (batch @ basis.mT).view(*dense.shape[:-2], m, rank), basis.view(*dense.shape[:-2], rank, n)


def resized(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Convert factors to another rank: keep the strongest directions for a smaller one, add zeros for a larger one."""
    n = right.shape[-1]
    left, right = left.double(), right.double()
    if rank == n:
        return left @ right, torch.eye(n, dtype=right.dtype, device=right.device).expand(*right.shape[:-2], n, n)
    missing = rank - right.shape[-2]
    if missing >= 0:
        return pad(left, (0, missing)), pad(right, (0, 0, 0, missing))
    strongest = torch.linalg.eigh(left.mT @ left).eigenvectors.flip(-1)[..., :rank]
    return left @ strongest, strongest.mT @ right
