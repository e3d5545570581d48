"""Orthogonalization of matrices by Newton-Schulz iteration, Muon's replacement of a second moment.

Muon (https://kellerjordan.github.io/posts/muon) moves a matrix along roughly the nearest orthogonal matrix to its
momentum. Singular vectors stay, and singular values become about 1. Five steps of an odd polynomial of degree five find
it by matrix products alone. Of two forms of the same iteration, the one with less work is used:

- plain: each step multiplies the matrix, ``20 m² n + 10 m³`` operations for ``m <= n``;
- Gram: the steps are polynomials in ``X Xᵀ``, so that all of them are multiplied as ``m x m`` matrices and applied to
  ``X`` once. In bfloat16 that alone fails (rounding of the Gram matrix gives directions that are not there), and with
  one restart, which forms it again from the matrix after three steps, it is as exact as the plain form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.base import Direction
from lightning_adapm.moments.batches import join, split
from lightning_adapm.moments.second import NoSecondMoment
from lightning_adapm.sharding.owners import Owners
from lightning_adapm.sharding.reduction import ONE_PROCESS, ProcessReduction, Reduction

Coefficients = tuple[float, float, float]
"""Those of ``X``, ``X Xᵀ X`` and ``(X Xᵀ)² X`` in one step."""
Step = Coefficients | tuple[Coefficients, ...]
"""A step, or a long one: with ``S = X Xᵀ``, it multiplies ``X`` by the last of some polynomials ``W`` of ``S``, each of
them ``a I + b S + c W²`` of the one before it, the first one of ``W = S``. All are symmetric.
"""
MUON: Coefficients = (3.4445, -4.7750, 2.0315)
"""Those of every step, by Keller Jordan."""
_FITTED: Mapping[int, tuple[Step, ...]] = {
    2: (
        ((1.376115, -8.223636, 7.390763), (-0.559955, 0.2246196, 1.0), (0.1722800, -0.1212257, 7.591912)),
        (
            (0.8174224, -4.338389, 3.695382),
            (-0.5582991, 0.4773328, 2.0),
            (-0.1130271, -0.4620632, 2.0),
            (3.660635, -7.765227, 16.00875),
        ),
    ),
    3: ((7.9483, -22.3097, 15.841), (3.5825, -2.5769, 0.4873), (2.5394, -1.8884, 0.4299)),
    4: (
        (8.2474, -23.4442, 16.7082),
        (4.0123, -2.8712, 0.5198),
        (3.5917, -2.5873, 0.4896),
        (2.5478, -1.9067, 0.4342),
    ),
}
"""Those of so many steps. Three and four are by the algorithm of Polar Express (arXiv 2505.16932): the widest range of
singular values that ends between 0.66 and 1.21. All but the last allow for matrices 2 % larger, because products are
rounded. Two are long, of degrees 17 and 33, fitted to the range of four: singular values from 0.0023 on end between
0.67 and 1.21. Powers of two keep every polynomial near 1, so that it loses little in float16.
"""


class Iteration(NamedTuple):
    """Steps of Newton-Schulz, and what matrices are divided by before."""

    steps: tuple[Step, ...] = (MUON,) * 5
    by_gram: bool = False
    """Divide by the root of the norm of the Gram matrix, a bound of the largest singular value that is closer than the
    matrix's own norm. Small singular values grow more.
    """


FIVE = Iteration()
"""Muon's."""
FAST: Mapping[int, Iteration] = {number: Iteration(steps, by_gram=True) for number, steps in _FITTED.items()}
"""Iterations of fewer steps, by their number."""
ITERATIONS: Mapping[str, int] = {"muon": 5, "fast": 2}
"""Kinds of iteration, and the steps that each has by default."""
_STEEP = 5.0


@dataclass(frozen=True)
class Orthogonal(NoSecondMoment):
    """Muon's step along a direction ``D``: ``0.2 sqrt(max(m, n))`` times the nearest orthogonal matrix to ``D``.

    The factor gives updates of the size of AdamW's, so that one learning rate serves all parameters of a model (torch
    calls it ``adjust_lr_fn="match_rms_adamw"``, arXiv 2502.16982). The size of ``D`` has no influence.
    """

    iteration: Iteration = FIVE
    """Newton-Schulz; without any step, matrices are scaled to a norm of 1."""
    whole_matrices: ClassVar[bool] = True

    def applied(self, direction: Direction, reduction: Reduction = ONE_PROCESS) -> Direction:
        """Orthogonalize ``direction``, whose tensors are matrices of one shape or stacks of them."""
        used = direction.multiplied().tensors
        if isinstance(reduction, ProcessReduction):
            rows, found = reduction.shards[0].size, self._over_processes(used, reduction)
        else:
            whole = join(used)
            dtype = product_dtype(whole.device, whole.dtype)
            found = split(_iterated(_normalized(whole, _squares(whole), dtype), self.iteration), used)
            rows = used[0].shape[-2]
        return sized(found, rows)

    def _over_processes(self, parts: list[Tensor], reduction: ProcessReduction) -> list[Tensor]:
        """The rows of this process; each matrix is worked on by one of those that hold it."""
        held = [shard.held_only(part) for shard, part in zip(reduction.shards, parts, strict=True)]
        squares = reduction.total([_squares(part.unsqueeze(0)) for part in held])
        dtype = product_dtype(parts[0].device, parts[0].dtype)
        held = [_normalized(part, total[0], dtype) for part, total in zip(held, squares, strict=True)]
        return Owners(reduction.shards, dtype).apply(partial(_iterated, iteration=self.iteration), held)


def sized(found: list[Tensor], rows: int) -> Direction:
    """Orthogonal matrices of so many ``rows``, over all processes, as updates of the size of AdamW's."""
    scale = scale_of(torch.Size((rows, found[0].shape[-1])))
    return Direction(found, scale, scratch=True, clamp=None)


def scale_of(shape: torch.Size) -> float:
    """Factor that gives an orthogonal matrix of a ``shape`` the size of AdamW's updates."""
    return 0.2 * float(max(shape[-2:])) ** 0.5


def iteration_of(kind: str, steps: int) -> Iteration:
    """So many steps of one of :data:`ITERATIONS`."""
    return Iteration((MUON,) * steps) if kind == "muon" else FAST[steps]


def newton_schulz(matrices: Tensor, iteration: Iteration = FIVE, dtype: torch.dtype | None = None) -> Tensor:
    """About the nearest orthogonal matrix to each of ``(b, m, n)``: singular values between 0.68 and 1.21.

    Zero singular values stay zero, and those below 2e-3 of the matrix's norm grow by a factor of up to 485 only.

    Args:
        matrices: Matrices of any scale. One that is zero or not finite gives zero.
        iteration: Steps of the iteration.
        dtype: Dtype of products and result; by default bfloat16 where that is fast, and float64 for float64.
    """
    dtype = dtype or product_dtype(matrices.device, matrices.dtype)
    return _iterated(_normalized(matrices, _squares(matrices), dtype), iteration)


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Dtype of the products for matrices of ``dtype``: bfloat16 where the device has instructions for it."""
    if dtype == torch.float64:
        return dtype
    return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32


@lru_cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _squares(matrices: Tensor) -> Tensor:
    """Sum of squares of each matrix, ``(b, 1, 1)``, in float64, because float32 under- or overflows."""
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float64).square_()


def _normalized(matrices: Tensor, squares: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale each matrix to a Frobenius norm of 1, by its ``squares``; zero where that is impossible."""
    norm = squares.sqrt().to(matrices.dtype)
    possible = norm.isfinite() & (norm > 0)
    return torch.where(possible, matrices / norm, 0.0).to(dtype)


def _iterated(found: Tensor, iteration: Iteration) -> Tensor:
    """Iterate on matrices of norm 1, in the form with less work."""
    if not found.numel():
        return found
    if iteration.by_gram:
        size = torch.linalg.vector_norm(_gram(found), dim=(-2, -1), keepdim=True)
        found = found / torch.where(size > 0, size, 1.0).sqrt()
    for steps in parts_of(found.shape, found.dtype, iteration.steps):
        found = _plain(found, *steps) if len(steps) == 1 else _by_gram(found, steps)
    return found


def parts_of(shape: Sequence[int], dtype: torch.dtype, coefficients: Sequence[Step]) -> list[Sequence[Step]]:
    """Steps with one Gram matrix each, in the form with less work."""
    parts = gram_parts(coefficients, dtype)
    if _work_of_gram(shape, parts) < _work_of_plain(shape, coefficients):
        return parts
    return [[step] for step in coefficients]


def squares_of(step: Step) -> Sequence[Coefficients]:
    """Coefficients of ``I``, ``S`` and ``W²`` in the polynomials of a step."""
    return step if isinstance(step[0], tuple) else (step,)


def constant_of(step: Step) -> float:
    """Return the factor by which a step multiplies small singular values."""
    found = 0.0
    for a, _, c in squares_of(step):
        found = a + c * found**2
    return found


def gram_parts(coefficients: Sequence[Step], dtype: torch.dtype) -> list[Sequence[Step]]:
    """Steps of the Gram form with one Gram matrix each."""
    steps = len(coefficients)
    if dtype.itemsize > 2 or steps < 2:
        return [coefficients] if steps else []
    if is_steep(coefficients):
        return [[step] for step in coefficients]
    restart = steps - steps // 2
    return [coefficients[:restart], coefficients[restart:]]


def is_steep(coefficients: Sequence[Step]) -> bool:
    """Whether the first step takes differences of large terms, whose rounding to bfloat16 the Gram form multiplies."""
    return bool(coefficients) and constant_of(coefficients[0]) > _STEEP


def _work_of_plain(shape: Sequence[int], steps: Sequence[Step]) -> int:
    """Cost in multiplications of ``m x m`` matrices, where ``m`` is the smaller side."""
    m, n = sorted(shape[-2:])
    return sum(2 * m * m * n + len(squares_of(step)) * m**3 for step in steps)


def _work_of_gram(shape: Sequence[int], parts: Sequence[Sequence[Step]]) -> int:
    m, n = sorted(shape[-2:])
    again = 3 * sum(len(steps) - 1 for steps in parts)  # products: two of the next Gram matrix, one of all steps
    return 2 * m * m * n * len(parts) + (again + sum(len(squares_of(s)) for steps in parts for s in steps)) * m**3


def _gram(found: Tensor) -> Tensor:
    """Gram matrix of the smaller side."""
    return found @ found.mT if found.shape[-2] <= found.shape[-1] else found.mT @ found


def _added(found: Tensor, polynomial: Tensor, a: float) -> Tensor:
    """Compute ``a found + polynomial found``, with the polynomial on the smaller side."""
    left, right = (polynomial, found) if found.shape[-2] <= found.shape[-1] else (found, polynomial)
    return torch.baddbmm(found, left, right, beta=a)


def _plain(found: Tensor, step: Step) -> Tensor:
    return _added(found, _polynomial(_gram(found), step), constant_of(step))


def _by_gram(found: Tensor, steps: Sequence[Step]) -> Tensor:
    product = _product(_gram(found), steps)
    return product @ found if found.shape[-2] <= found.shape[-1] else found @ product


def _product(gram: Tensor, steps: Sequence[Step]) -> Tensor:
    """Matrix that stands for several steps, computed from the Gram matrix."""
    polynomial = _polynomial(gram, steps[0])
    product = polynomial.clone()
    product.diagonal(dim1=-2, dim2=-1).add_(constant_of(steps[0]))
    for before, step in pairwise(steps):
        # the matrix's next Gram matrix: (a + p) S (a + p)
        a = constant_of(before)
        gram = _added(_added(gram, polynomial, a), polynomial, a)
        polynomial = _polynomial(gram, step)
        product = _added(product, polynomial, constant_of(step))
    return product


def _polynomial(gram: Tensor, step: Step) -> Tensor:
    """A step's polynomial without its constant, ``b S + c S²`` of a short one.

    The constant is added elsewhere, because it would round the rest away here.
    """
    (constant, b, c), *others = squares_of(step)
    found = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    for a, b, c in others:  # c (constant + W)² without c constant²
        found = torch.baddbmm(found, found, found, beta=2 * c * constant, alpha=c).add_(gram, alpha=b)
        constant = a + c * constant**2
    return found
