"""Newton-Schulz against polar factors, on spectra that are prescribed."""

import math

import pytest
import torch

from lightning_adapm.moments import orthogonal
from lightning_adapm.moments.orthogonal import newton_schulz

SIZES = [(96, 96), (64, 320), (320, 64), (1, 40), (40, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def with_spectrum(values, m, n):
    k = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64))[0] for size in (m, n))
    return (left * torch.as_tensor(values[:k], dtype=torch.float64)) @ right.mT


def hilbert(m, n):
    return 1 / (torch.arange(m, dtype=torch.float64)[:, None] + torch.arange(n, dtype=torch.float64) + 1)


SPECTRA = {
    "gaussian": lambda m, n: torch.randn(m, n, dtype=torch.float64),
    "one dominant direction": lambda m, n: with_spectrum([1e3] + [1.0] * (min(m, n) - 1), m, n),
    "condition 1e8": lambda m, n: with_spectrum(torch.logspace(0, -8, min(m, n)).tolist(), m, n),
    "hilbert": hilbert,
    "rank one": lambda m, n: with_spectrum([1.0] + [0.0] * (min(m, n) - 1), m, n),
    "1e20": lambda m, n: 1e20 * torch.randn(m, n, dtype=torch.float64),
    "1e-20": lambda m, n: 1e-20 * torch.randn(m, n, dtype=torch.float64),
    "1e-42": lambda m, n: 1e-42 * torch.randn(m, n, dtype=torch.float64),  # float32's subnormal numbers
}


ITERATIONS = {"muon": orthogonal.FIVE, "fast": orthogonal.FAST[3], "long": orthogonal.FAST[2]}


def scalar(values, iteration=ITERATIONS["muon"]):
    """What the iteration does to singular values of a matrix of norm 1."""
    if iteration.by_gram and values.norm():
        values = values / values.pow(4).sum() ** 0.25
    for step in iteration.steps:
        factor = gram = values**2
        for a, b, c in orthogonal.squares_of(step):
            factor = a + b * gram + c * factor**2
        values = values * factor
    return values


@pytest.mark.parametrize(
    ("form", "iteration"), [("plain", "muon"), ("gram", "muon"), ("gram", "fast"), ("gram", "long")]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SIZES)
@pytest.mark.parametrize("kind", SPECTRA)
def test_is_the_iteration_on_singular_values(kind, m, n, dtype, form, iteration, monkeypatch):
    """Singular vectors stay, however many of them there are; singular values go through the polynomial."""
    torch.manual_seed(0)
    monkeypatch.setattr(orthogonal, f"_work_of_{form}", lambda *_: -1)
    matrix, steps = SPECTRA[kind](m, n), ITERATIONS[iteration]
    given = matrix.to(torch.float64 if dtype == torch.float64 else torch.float32)[None]
    found = newton_schulz(given, steps, dtype)[0]
    assert found.dtype == dtype and found.shape == matrix.shape
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    error = {torch.float64: 1e-7, torch.float32: 2e-3, torch.bfloat16: 0.3 if iteration == "long" else 0.2}[dtype]
    # directions that are lost where the matrix is rounded to bfloat16, or to subnormal numbers, are not looked at
    seen = values > {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    seen &= values > (0.1 if kind == "1e-42" else 0)
    moved = (left.mT @ found.double() @ right.mT).diagonal()
    if kind == "1e-42" and iteration == "fast":  # steep at 1, where rounding to subnormal numbers shows
        error = max(error, 0.01)
    assert (moved - scalar(values, steps))[seen].abs().max() <= error
    assert torch.linalg.matrix_norm(found.double(), 2) <= {"muon": 1.21}.get(iteration, 1.2101) + error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_is_about_the_polar_factor(m, n, dtype):
    torch.manual_seed(0)
    matrix = torch.randn(3, m, n, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix, dtype=dtype).double()
    assert torch.nn.functional.cosine_similarity(found.flatten(), (left @ right).flatten(), dim=0) > 0.97
    if min(m, n) > 1:  # the smallest singular values of a square matrix are too small for five steps
        values = torch.linalg.svdvals(found)
        assert values.max() < 1.25
        assert m == n or values.min() > 0.65


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(8, 8), (4, 32), (32, 4)])
def test_one_matrix_of_a_batch_is_no_matter_of_another(m, n, dtype):
    torch.manual_seed(0)
    fine = torch.randn(m, n)
    bad = [torch.zeros(m, n), torch.full((m, n), math.inf), torch.full((m, n), math.nan), fine.clone()]
    bad[3][0, 0] = -math.inf
    found = newton_schulz(torch.stack([fine, *bad]), dtype=dtype)
    assert found[1:].eq(0).all()
    torch.testing.assert_close(found[0], newton_schulz(fine[None], dtype=dtype)[0])


def test_a_batch_of_nothing():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert newton_schulz(torch.zeros(shape)).shape == shape


def test_the_form_with_less_work_is_taken():
    five = ITERATIONS["muon"].steps

    def gram(m, n, dtype):
        return orthogonal.parts_of((m, n), dtype, five) == orthogonal.gram_parts(five, dtype)

    assert gram(2048, 8192, torch.bfloat16) and gram(8192, 2048, torch.bfloat16)
    assert not gram(2048, 2048, torch.bfloat16) and not gram(2048, 2048, torch.float32)
    assert gram(1024, 2048, torch.float32)
    assert len(orthogonal.parts_of((2048, 8192), torch.bfloat16, ITERATIONS["fast"].steps)) == 3


@pytest.mark.parametrize(("m", "n"), [(160, 64), (64, 160), (64, 64)])
def test_fast_steps_in_bfloat16_are_near_their_polynomial(m, n):
    """One Gram matrix for several steps, or one that is divided instead of its matrix, is two to four times as far."""
    torch.manual_seed(0)
    matrices = torch.randn(2, m, n)
    expected = newton_schulz(matrices.double(), orthogonal.FAST[4])
    found = newton_schulz(matrices, orthogonal.FAST[4], torch.bfloat16).double()
    assert (found - expected).norm() < 0.04 * expected.norm()


@pytest.mark.parametrize(("steps", "begin"), [(2, 0.0023), (3, 0.0101), (4, 0.0024)])
def test_fewer_steps_end_in_the_range_of_muons(steps, begin):
    iteration = orthogonal.FAST[steps]._replace(by_gram=False)
    values = scalar(torch.logspace(math.log10(begin), 0, 10_000, dtype=torch.float64), iteration)
    assert values.min() > 0.66 and values.max() < 1.2101
    assert scalar(torch.tensor(1.02), iteration) < 1.21  # of a matrix that rounding has made larger


def test_fewer_steps_begin_with_larger_singular_values():
    matrices = torch.randn(2, 96, 96, generator=torch.Generator().manual_seed(0))
    values = [torch.linalg.svdvals(newton_schulz(matrices, iteration).double()) for iteration in ITERATIONS.values()]
    assert values[1][:, -2].min() > 0.6 * values[0][:, -2].min()
