"""Orthogonal updates by kernels, interpreted on a CPU: the same as by torch's operations."""

import math
from types import SimpleNamespace

import pytest
import torch
from allocations import transient_of_a_step
from models import relative_difference
from torch import nn

from lightning_adapm import PartialMuon
from lightning_adapm.moments import orthogonal as reference
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.reduction import ProcessReduction
from lightning_adapm.sharding.rows import RowShard
from lightning_adapm.step import by_kernels, exchange, kernels, newton_schulz, orthogonal
from lightning_adapm.step.interleaving import interleave
from lightning_adapm.step.launch import Matrices
from lightning_adapm.step.moves import Average
from lightning_adapm.step.reading import read
from lightning_adapm.step.transients import step_transients

pytest.importorskip("triton", reason="the kernels are Triton's")

SHAPES = {
    "q_proj.weight": (12, 18),
    "v_proj.weight": (12, 18),
    "o_proj.weight": (18, 12),
    "mlp.experts": (2, 20, 14),
    "norm.weight": (18,),
}


FIVE, FAST = reference.FIVE, reference.FAST


def plain(matrices, iteration=FIVE):
    """The iteration in float64."""
    return reference._iterated(matrices.double(), iteration)


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """Products in float32 on both sides."""
    monkeypatch.setattr(reference, "_multiplies_bfloat16", lambda device: False)


def trained(shapes=SHAPES, dtype=torch.float32, observer=None, broken=(1,), **options):
    """Weights, state and optimizer after three steps, one of which has gradients that are not finite."""
    torch.manual_seed(0)
    weights = {name: nn.Parameter(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    group = {"params": list(weights.items()), "n_head": 1, "n_query_groups": 1}
    defaults = {
        "lr": 1e-2,
        "rank": 2,
        "update_proj_gap": 2,
        "newton_schulz": "muon",
        "ns_steps": 2,
        "roles": {"experts": "mlp"},
        "state_dtype": None,
    }
    optimizer = PartialMuon([group], **defaults | options)
    optimizer.observer = observer
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
            if step in broken:
                weight.grad.view(-1)[-2] = float("nan")
        optimizer.step()
    state = [v.float().flatten() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return torch.cat([w.detach().float().flatten() for w in weights.values()]), torch.cat(state), optimizer


def figures(probe):
    return sorted((reading.name, sorted(reading.figures.items())) for reading in probe.read())


def assert_as_watched_and_without_kernels(monkeypatch, weights, state, options, tolerances, figure):
    """A monitor changes no bit. Without kernels, weights, state and a monitor's figures agree within tolerances."""
    probe, other = ResidualProbe(), ResidualProbe()
    watched = trained(observer=probe, **options)
    assert torch.equal(watched[0], weights) and torch.equal(watched[1], state)
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, expected_state, _ = trained(observer=other, **options)
    assert relative_difference(weights, expected) < tolerances[0]
    assert relative_difference(state, expected_state) < tolerances[1]
    for (name, found), (same, wanted) in zip(figures(probe), figures(other), strict=True):
        assert name == same and dict(found) == pytest.approx(dict(wanted), **figure)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": "full"}, {"nesterov": False, "weight_decay": 0, "state_dtype": "float16"}],
    ids=["default", "muon", "average in float16"],
)
def test_as_without_kernels(interpreted, monkeypatch, options):
    """Low-rank momentum with refreshes, full and none; stacks; several tiles; also watched, which changes no bit."""
    monkeypatch.setattr(orthogonal, "DIRECT", (16, 16, 4, 3))
    monkeypatch.setattr(orthogonal, "DIRECT_ALONG", (16, 16, 4, 3))
    weights, state, optimizer = trained(**options)
    assert {row.path for row in optimizer.step_paths()} == {"kernels"}
    assert {"read", "direct", "symmetric", "move"} <= set(interpreted)
    tolerances = 1e-5, 1e-2 if "state_dtype" in options else 1e-5
    figure = {"rel": 2e-3, "abs": 1e-4}
    assert_as_watched_and_without_kernels(monkeypatch, weights, state, options, tolerances, figure)


def test_full_momentum_in_eight_bits(interpreted, monkeypatch):
    """In rows of one block, and of several with a rest, which tiles do not cut."""
    shapes = {"q_proj.weight": (12, 18), "v_proj.weight": (6, 300), "mlp.experts": (2, 5, 270)}
    options = {"momentum": "full", "state_dtype": "int8"}
    monkeypatch.setattr(orthogonal, "DIRECT", (2, 256, 4, 3))
    weights, state, optimizer = trained(shapes, **options)
    assert {row.path for row in optimizer.step_paths()} == {"kernels"}
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, expected_state, _ = trained(shapes, **options)
    assert relative_difference(weights, expected) < 1e-4
    assert relative_difference(state, expected_state) < 1e-2


def test_parameters_in_bfloat16_are_rounded_alike(interpreted, monkeypatch):
    weights, _, _ = trained(dtype=torch.bfloat16, broken=())
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, _, _ = trained(dtype=torch.bfloat16, broken=())
    assert (weights == expected).float().mean() > 0.98


def test_directions_that_torch_finds_are_orthogonalized_by_kernels(interpreted, monkeypatch):
    weights, _, optimizer = trained(maximize=True)
    assert {row.path for row in optimizer.step_paths()} == {"torch and kernels"} and "symmetric" in interpreted
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    assert relative_difference(weights, trained(maximize=True)[0]) < 1e-5


def test_rows_that_processes_share_stay_with_the_kernels(interpreted, monkeypatch, hold_all_rows):
    """The other process gets no matrix. Of each batch, gradients are read while the one before moves."""
    monkeypatch.setattr(exchange, "ROUND_NUMEL", 1)
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected = trained(shapes)
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    hold_all_rows()
    found = trained(shapes, basis="replicate")
    assert {row.path for row in found[2].step_paths()} == {"kernels"} and "direct" in interpreted
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert relative_difference(one, other) < 1e-5


@pytest.mark.parametrize(
    ("iteration", "dtype", "result"),
    [(FIVE, torch.float32, torch.float32), (FAST[3], torch.bfloat16, torch.float16)],
    ids=["five", "three in float16"],
)
def test_a_process_that_is_given_no_matrix(interpreted, monkeypatch, iteration, dtype, result):
    """Of one matrix and two processes, the second: it sends its rows, and receives those of the result."""
    exchanged, done = [], SimpleNamespace(wait=lambda: None)

    def exchange_all(received, sent, taken, given, group, async_op):
        exchanged.append((len(sent), len(received), taken, given))
        assert sent.dtype == received.dtype
        return done

    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor, op, group, async_op: done)
    monkeypatch.setattr("torch.distributed.all_to_all_single", exchange_all)
    shard = RowShard(Layout(torch.Size((6, 4)), ((0, 12), (12, 24)), 1, "both", "a mesh"))
    rows, squares = torch.randn(1, 3, 4, dtype=dtype), torch.ones(1, dtype=torch.float64)
    found = []

    def work():
        found.append((yield from orthogonal.updates(rows, squares, iteration, [], ProcessReduction([shard]))))

    interleave([work()])
    assert exchanged == [(3, 0, [0, 0], [3, 0]), (0, 3, [3, 0], [0, 0])]
    assert found[0].tensors[0].shape == (3, 4) and found[0].tensors[0].dtype == result


@pytest.mark.parametrize(("m", "n"), [(50, 50), (37, 70), (70, 37)])
@pytest.mark.parametrize("parts", [(5,), (3, 2), (1, 1, 1, 1, 1)])
def test_is_the_iteration_of_the_plain_form(interpreted, monkeypatch, m, n, parts):
    torch.manual_seed(0)
    matrices = torch.randn(2, m, n)
    matrices /= matrices.norm(dim=(-2, -1), keepdim=True)
    monkeypatch.setattr(newton_schulz, "parts_of", lambda *_: [[reference.MUON] * part for part in parts])
    monkeypatch.setattr(newton_schulz, "SYMMETRIC", (32, 32, 64, 4, 3))
    monkeypatch.setattr(newton_schulz, "LARGE_SYMMETRIC", (32, 64, 64, 4, 3))
    expected, given = plain(matrices), matrices.clone()
    found = newton_schulz.iterated(given, FIVE)
    assert relative_difference(found, expected) < 1e-4
    assert (found.data_ptr() == given.data_ptr()) == (len(parts) == 2)  # from one memory to another and back
    scales = torch.tensor([1e-14, 1e14])
    found = newton_schulz.iterated(scales[:, None, None] * matrices, FIVE, 1 / scales)
    assert relative_difference(found, expected) < 1e-4


@pytest.mark.parametrize(("m", "n"), [(96, 96), (96, 192), (192, 96)])
@pytest.mark.parametrize("kind", ["gaussian", "one dominant direction", "powers", "zero"])
@pytest.mark.parametrize(("iteration", "error"), [(FAST[2], 0.4), (FAST[3], 0.1), (FAST[4], 0.3)], ids=["2", "3", "4"])
def test_few_steps_in_float16(interpreted, iteration, error, m, n, kind):
    """One Gram matrix, and still as near as bfloat16 with a restart."""
    torch.manual_seed(0)
    k = min(m, n)
    left, right = (torch.linalg.qr(torch.randn(size, k, dtype=torch.float64))[0] for size in (m, n))
    spectra = {
        "gaussian": torch.linalg.svdvals(torch.randn(m, n, dtype=torch.float64)),
        "one dominant direction": torch.tensor([1e3] + [1.0] * (k - 1), dtype=torch.float64),
        "powers": 1 / torch.arange(1, k + 1, dtype=torch.float64),
        "zero": torch.zeros(k, dtype=torch.float64),
    }
    values = spectra[kind] / max(1e-30, spectra[kind].norm())
    matrices = ((left * values) @ right.mT)[None]
    expected = plain(matrices, iteration)
    given = (newton_schulz.NORM * matrices).half()
    found = newton_schulz.iterated_in_half(given, iteration)
    assert torch.linalg.matrix_norm(found.double() - expected, 2) < error
    assert torch.linalg.matrix_norm(found.double() - expected) < error * math.sqrt(k) / 2
    assert torch.linalg.matrix_norm(found.double(), 2) < 1.25


def test_fast_steps_are_taken(interpreted, monkeypatch):
    weights, _, _ = trained(newton_schulz="fast", ns_steps=3)
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, _, _ = trained(newton_schulz="fast", ns_steps=3)
    assert relative_difference(weights, expected) < 1e-5
    assert relative_difference(trained(ns_steps=3)[0], expected) > 1e-4


@pytest.mark.parametrize("broken", [(), (1,)], ids=["finite", "one that is not"])
def test_directions_are_written_in_float16(interpreted, monkeypatch, broken):
    """Low-rank momentum with refreshes, and no momentum; a monitor changes no bit."""
    monkeypatch.setattr(by_kernels, "is_half", lambda *_: True)
    monkeypatch.setattr(orthogonal, "DIRECT_ALONG", (16, 16, 4, 3))
    options = {"newton_schulz": "fast", "broken": broken}
    weights, state, _ = trained(**options)
    assert interpreted.count("bound") == 3 + 2 + 2  # attention outputs in every step; others once they have a basis
    assert interpreted.count("read") == 25  # as with Muon's steps: what bounds norms was read anyway
    figure = {"rel": 0.02, "abs": 0.01}
    assert_as_watched_and_without_kernels(monkeypatch, weights, state, options, (2e-4, 1e-5), figure)


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_directions_in_float16_of_any_size(interpreted, scale):
    """Factors may be as large as gradients; no update where both are zero, or factors are not finite."""
    torch.manual_seed(0)
    grads = [scale * torch.randn(70, 80)[:, :40] for _ in range(4)]
    left, right = scale * torch.randn(4, 70, 16), torch.linalg.qr(torch.randn(4, 40, 5))[0].mT.contiguous()
    left[..., 5:], left[2], left[3, 3, 2] = 0, 0, float("inf")
    grads[1] *= 0.1
    grads[2].zero_()
    _, known = read(Matrices.of(grads), 4, None, 0, None)
    factors, lengths = (left, Matrices.of([right])), left.square().sum(-1)
    found, scaled = orthogonal.direct_in_half(Matrices.of(grads), known, factors, lengths, 0.9)
    expected = torch.stack(grads)[:2].double() + 0.9 * left[:2, :, :5].double() @ right[:2].double()
    assert relative_difference(orthogonal.unscaled(found, scaled)[:2].double(), expected) < 1e-3
    torch.testing.assert_close(scaled.squares, found.float().square().sum((1, 2)), rtol=1e-2, atol=0)
    for iteration in (FAST[2], FAST[3]):
        moved = orthogonal._orthogonalized(found.clone(), scaled, iteration)
        wanted = plain(expected / expected.norm(dim=(1, 2), keepdim=True), iteration)
        assert relative_difference(moved[:2].double(), wanted) < 0.03
        assert moved[2:].eq(0).all()


@pytest.mark.parametrize("iteration", [FAST[2], FAST[3]], ids=["long steps", "short steps"])
@pytest.mark.parametrize("shape", [(20, 24), (20, 60)])
def test_directions_in_float16_that_cancel(interpreted, shape, iteration):
    """Far below their bound, they give smaller updates, and NaN nowhere."""
    torch.manual_seed(0)
    right = torch.linalg.qr(torch.randn(6, shape[1], 16))[0].mT.contiguous()
    left = torch.randn(6, shape[0], 16)
    grads = list(left @ right)
    left *= torch.tensor([1e-1, 1e-2, 1e-3, 1e-5, 1e-7, 0.0])[:, None, None] - 1
    _, known = read(Matrices.of(grads), 6, None, 0, None)
    factors, lengths = (left, Matrices.of([right])), left.square().sum(-1)
    found = orthogonal.direct_in_half(Matrices.of(grads), known, factors, lengths, 1.0)
    sizes = torch.linalg.matrix_norm(orthogonal._orthogonalized(*found, iteration).float(), 2)
    assert sizes[:3].min() > 0.66 and sizes.max() < 1.5 and sizes[4:].max() < 0.1


def test_which_matrices_are_multiplied_in_float16():
    def half(m, n, iteration, dtype=torch.bfloat16):
        return newton_schulz.is_half((m, n), dtype, iteration)

    assert half(32, 128, FAST[3]) and half(128, 32, FAST[4])
    assert not half(32, 32, FAST[3]) and not half(32, 128, FAST[3], torch.float32)
    assert half(32, 32, FAST[2]) and half(32, 128, FAST[2]) and not half(32, 32, FAST[2], torch.float32)
    assert not half(32, 128, FIVE)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("described", [False, True])
def test_a_symmetric_product(interpreted, monkeypatch, transposed, described):
    monkeypatch.setattr(newton_schulz, "LARGE_SYMMETRIC", (16, 32, 16, 4, 3))
    monkeypatch.setattr(kernels, "has_accelerator", lambda device: described)
    matrices, added = torch.randn(2, 52, 72), torch.randn(2, 52, 52)
    added = added + added.mT
    given = matrices.mT.contiguous().mT if transposed else matrices
    found = newton_schulz.symmetric(given, given, added, alpha=0.5, beta=2.0)
    torch.testing.assert_close(found, 0.5 * matrices @ matrices.mT + 2 * added, rtol=1e-5, atol=1e-4)
    assert torch.equal(found, found.mT)
    factors, one = torch.tensor([2.0, -1.0]), torch.eye(52).repeat(2, 1, 1)
    found = newton_schulz.symmetric(added, one, added, beta=3.0, diagonal=0.5, factors=factors)
    torch.testing.assert_close(found, factors[:, None, None] * (4 * added + 0.5 * one))
    other = {"other": added, "gamma": 5.0, "factors": factors}
    found = newton_schulz.symmetric(given, given, added, beta=3.0, powers=(2, 1, 0, 1), **other)
    scale = factors[:, None, None]
    expected = scale.square() * (matrices @ matrices.mT) + (3 * scale + 5) * added
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    found = newton_schulz.symmetric(given, given, added, beta=3.0, powers=(0, 0, 1, 0), **other)
    torch.testing.assert_close(found, matrices @ matrices.mT + (3 + 5 * scale) * added, rtol=1e-5, atol=1e-3)


def test_what_a_symmetric_product_loses(interpreted):
    matrices = torch.randn(2, 52, 72).half()
    lost = torch.empty(2, 52, 52, dtype=torch.float16)
    found = newton_schulz.symmetric(matrices, matrices, lost=lost)
    expected = matrices.double() @ matrices.double().mT
    rounding = expected - found.double()
    assert rounding.abs().max() > 1e-3
    torch.testing.assert_close(lost.double(), rounding, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_sizes_neither_overflow_nor_vanish(interpreted, scale):
    """Of rows in any memory layout; an average that is not finite gives an infinite norm, and finite entries."""
    grads = [scale * torch.randn(20, 80)[:, :40] for _ in range(2)]
    averages = [torch.zeros(20, 40) for _ in grads]
    averages[1][3, 5] = float("nan")
    momentum = Average(Matrices.of(averages), 0.5)
    flaws = torch.zeros(2, dtype=torch.int32)
    found, squares = orthogonal.direct(Matrices.of(grads), flaws, momentum, None, 0.5)
    assert squares[0].item() == pytest.approx((0.75 * grads[0].double()).square().sum().item(), rel=1e-5)
    assert squares[1].isinf() and found.isfinite().all()
    torch.testing.assert_close(found[0], 0.75 * grads[0])


def test_norms_that_are_impossible_give_no_update(interpreted):
    """Those of other matrices are divided out, of any size; there may be no matrix."""
    norms = torch.tensor([0.0, 3.0, float("inf"), float("nan"), 1e-39, 1e-20, 1e25], dtype=torch.float64)
    found = norms.nan_to_num(1.0, 1.0)[:, None, None].float() * torch.eye(4)[:2] / 2**0.5
    (moved,) = orthogonal.updates_of_whole(found, norms.square(), FIVE, [found]).tensors
    values = torch.linalg.svdvals(moved)
    assert values[[0, 2, 3, 4]].eq(0).all() and values[[1, 5, 6]].sub(values[1, 0]).abs().max() < 1e-5
    assert 0.68 < values[1, 0] < 1.21
    none = torch.empty(0, 2, 4)
    assert orthogonal._orthogonalized(none, torch.empty(0, dtype=torch.float64), FIVE).shape == none.shape


@pytest.mark.parametrize("shape", [(4, 4), (4, 8)])
def test_norms_whose_inverse_overflows_give_no_update_in_float16(interpreted, shape):
    """A momentum decays through all of them once its gradients are zero. Others of a norm that is small are moved."""
    norms = torch.tensor([1e-39, 1.3e-38, 1e-37, 1.8e-37, 1e-36, 1e-20], dtype=torch.float64)
    found = (norms[:, None, None] * torch.eye(*shape) / 2).to(torch.bfloat16)
    values = torch.linalg.svdvals(orthogonal._orthogonalized(found, norms.square(), FAST[2]).float())
    assert values[:4].eq(0).all() and (values[4:] - 0.94).abs().max() < 0.28


def test_allocates_no_more_than_is_planned(interpreted):
    """In the first step, in one that refreshes, in one that does not, and in one that is watched."""
    torch.manual_seed(0)
    weights = {f"layers.{i}.mlp.weight": nn.Parameter(torch.randn(96, 64)) for i in range(3)}
    optimizer = PartialMuon(list(weights.items()), rank=4, update_proj_gap=2)
    bound = step_transients(part for weight in weights.values() for part in optimizer.parts(weight))
    for weight in weights.values():
        optimizer._make_state(weight)
    for probe in (None, None, None, ResidualProbe()):
        for weight in weights.values():
            weight.grad = torch.randn(96, 64)
        optimizer.observer = probe
        assert 0 < transient_of_a_step(optimizer) <= bound
