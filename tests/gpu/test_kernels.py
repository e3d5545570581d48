"""Each kernel by itself: next to plain operations, or bit by bit next to the CPU."""

import pytest
import torch
from on_gpu import NEEDED

from lightning_adapm.moments import orthogonal as reference
from lightning_adapm.step import kernels, newton_schulz, nonfinite, orthogonal, reading
from lightning_adapm.step.averages import squares_of_weights, weigh
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.moves import Divisors, move
from lightning_adapm.step.reading import combine, read
from lightning_adapm.step.rounding import StochasticRounding, Stream

pytestmark = NEEDED


FIVE, FAST = reference.FIVE, reference.FAST


def plain(matrices, iteration=FIVE):
    """The iteration in float64."""
    return reference._iterated(matrices.double(), iteration)


@pytest.mark.parametrize("shape", [(3, 2048, 2048), (2, 512, 2048), (2, 2048, 512), (2, 1000, 777), (3, 100, 130)])
def test_newton_schulz_by_symmetric_products(shape):
    """In bfloat16, next to the plain form in float64; and one product of columns, with what is added."""
    matrices = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    matrices /= matrices.norm(dim=(-2, -1), keepdim=True)
    for iteration in (FIVE, FAST[3], FAST[4]):
        found = newton_schulz.iterated(matrices.bfloat16(), iteration).double()
        expected = plain(matrices, iteration)
        assert (found - expected).norm() < 0.05 * expected.norm()
    for steps, iteration in FAST.items():
        found = newton_schulz.iterated_in_half((newton_schulz.NORM * matrices).half(), iteration).double()
        expected = plain(matrices, iteration)
        assert (found - expected).norm() < {2: 0.03, 3: 0.01, 4: 0.02}[steps] * expected.norm()
    given = matrices.bfloat16()
    added = given.mT @ given
    product = newton_schulz.symmetric(given.mT, given.mT, added, alpha=0.5, beta=2.0).double()
    expected = 0.5 * given.double().mT @ given.double() + 2 * added.double()
    assert (product - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("iteration", [FIVE, FAST[4], FAST[2]], ids=["5 of Muon's", "4, in float16", "2, long"])
def test_orthogonal_updates_of_any_size(iteration):
    """All alike, but none of a gradient that is zero or not finite."""
    gradient = torch.randn(512, 768, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    sizes = [1.0, 1e-18, 1e18, 1e30, 0.0, float("inf")]
    flaws = torch.zeros(len(sizes), dtype=torch.int32, device="cuda")
    found, squares = orthogonal.direct(Matrices.of([size * gradient for size in sizes]), flaws, None, None, 1.0)
    like = [gradient] * len(sizes)
    moved = torch.stack(orthogonal.updates_of_whole(found, squares, iteration, like).tensors).double()
    expected = plain((gradient / gradient.norm())[None], iteration)
    assert (moved[:4] - expected).flatten(1).norm(dim=1).max() < 0.05 * expected.norm()
    assert moved[4:].eq(0).all()


@pytest.mark.parametrize(("m", "n", "r"), [(2048, 1024, 307), (1000, 776, 80)])
def test_directions_are_written_in_float16(m, n, r):
    """Scaled by a bound of their norms, for which entries are read where squares overflow or vanish."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [1.0, 1e-25, 1e25, 1e-3, 0.0]
    grads = [size * torch.randn(m, n, device="cuda", generator=generator) for size in sizes]
    right = torch.linalg.qr(torch.randn(n, r, device="cuda", generator=generator))[0].T.contiguous().bfloat16()
    left = torch.zeros(len(sizes), m, kernels.padded(r), device="cuda", dtype=torch.bfloat16)
    left[..., :r] = torch.randn(m, r, device="cuda", generator=generator)
    left *= torch.tensor([*sizes[:3], 1.0, 0.0], device="cuda")[:, None, None]
    rights = Matrices.of([right.expand(len(sizes), r, n).contiguous()])
    _, known = read(Matrices.of(grads), len(sizes), rights, r, None)
    lengths = left.float().square().sum(-1)
    found, scaled = orthogonal.direct_in_half(Matrices.of(grads), known, (left, rights), lengths, 0.9)
    expected = torch.stack(grads).double() + 0.9 * left[..., :r].double() @ right.double()
    got = found[:4].double() / scaled.factors[:4, None, None].double()
    norm = expected.norm(dim=(1, 2))
    assert ((got - expected[:4]).norm(dim=(1, 2)) / norm[:4]).max() < 1e-3
    moved = orthogonal._orthogonalized(found, scaled, FAST[2]).double()
    wanted = plain(expected[:3] / norm[:3, None, None], FAST[2])
    assert (moved[:3] - wanted).norm() < 0.03 * wanted.norm()
    assert moved[4].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("m", "n", "r"), [(2048, 1024, 102), (512, 2048, 204), (520, 1024, 300), (520, 2048, 600), (1000, 777, 10)]
)
def test_products_of_gradients(monkeypatch, dtype, m, n, r):
    """Every time: where a compiler lets a copy overtake the product that reads it, only some come out wrong."""
    generator = torch.Generator("cuda").manual_seed(0)
    grads = [torch.randn(m, n, device="cuda", dtype=dtype, generator=generator) for _ in range(6)]
    bases = torch.randn(6, r, n, device="cuda", generator=generator).to(torch.bfloat16)
    expected = torch.stack([grad.float() @ basis.float().T for grad, basis in zip(grads, bases, strict=True)])
    for programs in (0, reading.PROGRAMS) * 3:  # by tiles of many matrices and of few
        monkeypatch.setattr(reading, "PROGRAMS", programs)
        product, found = read(Matrices.of(grads), 6, Matrices.of([bases]), r, None, columns=True)
        assert (product[..., :r] - expected).norm() < 5e-3 * expected.norm()
        torch.testing.assert_close(found.squares, torch.stack([grad.float().square().sum(1) for grad in grads]))
        torch.testing.assert_close(found.columns, torch.stack([grad.float().square().sum(0) for grad in grads]))
        assert not found.flaws.any()
        weights = product[..., :r].contiguous()
        combined = combine(Matrices.of(grads), weights, found.flaws)
        summed = weights.mT @ torch.stack([grad.float() for grad in grads])
        assert (combined - summed).norm() < 5e-3 * summed.norm()
        lefts = [weight.to(dtype) for weight in weights]
        known = product, Matrices.of(lefts), found.flaws, 0.5
        weighed = weigh(*known, squares_of_weights(*known)).float()
        mean = torch.lerp(torch.stack(lefts).float(), weights, 0.5)
        assert (weighed - mean / mean.norm(dim=1, keepdim=True)).norm() < 5e-3 * weighed.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1000,), (300, 999), (3, 100, 200)])
def test_parameters_are_rounded_as_on_a_cpu(dtype, shape):
    """Bit by bit: kernels draw the same numbers, and round subnormal and large values, infinities and NaN alike."""
    generator = torch.Generator().manual_seed(0)
    number = 2 * torch.Size(shape).numel()
    values = torch.randn(number, generator=generator) * torch.logspace(-10, 5, number)
    values[::50] = torch.tensor([float("inf"), float("nan"), 7e4, 3.4e38]).repeat(number)[: len(values[::50])]
    values = list(values.view(2, *shape).unbind())
    start = 2**32 - 12 + shape[-1] % 2  # of an even place where rows are even
    rounding = StochasticRounding((Stream(0x9E3779B9, 7, 0), Stream(3, 0x85A308D3, start)), 12345)
    expected = [torch.zeros(shape, dtype=dtype) for _ in values]
    params = [param.cuda() for param in expected]
    negative = [-value.cuda() for value in values]  # kernels hold addresses only
    directions = Matrices.of(negative)
    divisors = Divisors(torch.ones(len(directions.addresses), directions.shape[0], device="cuda"), 1.0, 0.0)
    move(params, directions, divisors, lr=1.0, decay=0.0, rounding=rounding)
    rounding.write(expected, [value.clone() for value in values])
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param.cpu(), other, rtol=0, atol=0, equal_nan=True)


def test_gradients_of_any_shapes_are_found_to_be_finite_together():
    """A sum of large finite numbers overflows; what a process holds of a gradient may be nothing."""
    values = [[1.0, 2.0], [], [1.0, float("nan"), 2.0], [3e38, 3e38, 3e38], [-float("inf"), 1.0], [float("nan")] * 9999]
    grads = [
        torch.tensor(each, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16) for each in values
    ]
    assert nonfinite._each_finite(grads).tolist() == [True, True, False, True, False, False] * 2
    assert nonfinite._each_finite(grads[1:2]).tolist() == [True]
