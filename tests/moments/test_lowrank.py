"""The mathematics of the subspace."""

import pytest
import torch
from models import relative_difference

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.first import LowRankMomentum

torch.manual_seed(0)


def projector_error(rows):
    """Distance of ``rows rowsᵀ`` from the identity on the rows that are not zero."""
    alive = (rows.norm(dim=-1) > 0).to(rows.dtype)
    return (rows @ rows.mT - torch.diag_embed(alive)).abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("spread", [0, 3, 8], ids=["even", "1e3", "1e8"])
def test_orthonormal_rows(dtype, scale, spread):
    rows = torch.randn(4, 12, 50, dtype=dtype) * torch.logspace(0, -spread, 50, dtype=dtype) * scale
    result = lowrank.orthonormal_rows(rows)
    assert projector_error(result) < (1e-6 if dtype == torch.float32 else 1e-13)


def test_dependent_rows_become_zero_and_dead_columns_stay_zero():
    rows = torch.randn(2, 3, 40)
    rows = torch.cat([rows, rows.flip(1), torch.zeros(2, 1, 40)], dim=1)
    rows[:, :, ::3] = 0.0
    result = lowrank.orthonormal_rows(rows)
    assert (result.norm(dim=-1) > 0.5).sum(dim=-1).tolist() == [3, 3]
    assert projector_error(result) < 1e-6
    assert not result[:, :, ::3].any()


def test_stacks_of_any_shapes_are_made_orthonormal_together():
    """As one by one; one with an entry that is not finite spoils no other and keeps its basis."""
    stacks = [torch.randn(2, 3, 40), torch.randn(1, 7, 20), torch.randn(3, 67, 90)]
    together, finite = lowrank.orthonormalize(stacks)
    assert finite.all()
    for result, stack in zip(together, stacks, strict=True):
        torch.testing.assert_close(result, lowrank.orthonormal_rows(stack))
    stacks[1][0, 2, 3] = float("inf")
    bases = [torch.randn_like(stack) for stack in stacks]
    shown = [torch.ones(len(stack), 1, 1, dtype=torch.bool) for stack in stacks]
    found = lowrank.refreshed(list(zip(stacks, shown, bases, strict=True)))
    torch.testing.assert_close(found[1], bases[1], rtol=0, atol=0)
    for result, expected in zip(found[::2], together[::2], strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_refreshes_find_the_strongest_subspace(shape):
    u, v = (torch.linalg.qr(torch.randn(n, 30, dtype=torch.float64)).Q for n in shape)
    grad = (u * torch.logspace(0, -3, 30, dtype=torch.float64)) @ v.T
    left, right = torch.zeros(1, shape[0], 5, dtype=grad.dtype), torch.zeros(1, 5, shape[1], dtype=grad.dtype)
    errors = []
    for _ in range(40):
        right = lowrank.refresh_basis(grad[None], left, right, beta1=0.9)
        left = 0.1 * grad @ right.mT
        errors.append((grad - grad @ right[0].T @ right[0]).norm().item())
    best = torch.linalg.svdvals(grad)[5:].norm().item()
    assert errors[-1] <= errors[0]
    assert errors[-1] == pytest.approx(best, rel=1e-3)


def test_refresh_matches_its_definition():
    grad, left, right = torch.randn(1, 9, 7).double(), torch.randn(1, 9, 2).double(), torch.randn(1, 2, 7).double()
    right = lowrank.orthonormal_rows(right)
    average = 0.9 * left @ right + 0.1 * grad
    wanted = lowrank.orthonormal_rows((average.mT @ average @ right.mT).mT)
    found = lowrank.refresh_basis(grad, left, right, beta1=0.9)
    torch.testing.assert_close(found.mT @ found, wanted.mT @ wanted)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_gradient_without_information_leaves_the_basis(bad):
    right = lowrank.orthonormal_rows(torch.randn(2, 3, 8))
    grad = torch.stack([torch.full((6, 8), bad), torch.randn(6, 8)])
    result = lowrank.refresh_basis(grad, torch.zeros(2, 6, 3), right, beta1=0.9)
    assert torch.equal(result[0], right[0])
    assert not torch.equal(result[1], right[1])


def test_the_starting_rows_are_fixed_and_well_mixed():
    rows = lowrank.starting_rows(4, 1000, torch.empty(()))
    assert torch.equal(rows, lowrank.starting_rows(4, 1000, torch.empty(())))
    assert rows.abs().max() <= 1
    assert rows.mean().abs() < 0.05
    assert relative_difference(rows @ rows.T / 1000, torch.eye(4) / 3) < 0.2
    # Of an integer hash: the same on every device, in every process and in every version that can resume an older run.
    first = lowrank.starting_rows(1, 3, torch.empty((), dtype=torch.float64))
    torch.testing.assert_close(
        first, torch.tensor([[0.493781, 0.664905, -0.993538]], dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_the_first_basis_comes_with_the_first_gradient():
    momentum = LowRankMomentum(2, 0.9, 100)
    state = momentum.make(torch.Size((6, 5)), torch.empty(()))
    for step in range(1, 4):
        momentum.direction([torch.zeros(6, 5)], [state], step)
        assert state["seeded"] == 0
    momentum.direction([torch.randn(6, 5)], [state], 4)
    assert state["seeded"] == 1
    basis = state["exp_avg_r"].clone()
    momentum.direction([torch.randn(6, 5)], [state], 5)
    assert torch.equal(state["exp_avg_r"], basis)
    momentum.direction([torch.randn(6, 5)], [state], 101)
    assert not torch.equal(state["exp_avg_r"], basis)


def test_a_basis_regrows_after_gradients_of_low_rank():
    momentum = LowRankMomentum(3, 0.9, 1)
    state = momentum.make(torch.Size((8, 9)), torch.empty(()))
    momentum.direction([torch.outer(torch.randn(8), torch.randn(9))], [state], 1)
    assert (state["exp_avg_r"].norm(dim=-1) > 0.5).sum() == 1
    momentum.direction([torch.randn(8, 9)], [state], 2)
    assert (state["exp_avg_r"].norm(dim=-1) > 0.5).sum() == 3


def test_a_refresh_compiles_without_a_graph_break():
    grad, left, right = torch.randn(2, 6, 5), torch.randn(2, 6, 2), lowrank.orthonormal_rows(torch.randn(2, 2, 5))
    compiled = torch.compile(lowrank.refresh_basis, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(grad, left, right, 0.9), lowrank.refresh_basis(grad, left, right, 0.9))


def test_every_stack_of_experts_is_seeded_by_itself():
    """Two stacks in one batch, of which the first waits for an expert that no token reaches."""
    momentum, shape = LowRankMomentum(2, 0.9, 100), torch.Size((3, 12, 10))
    states = [momentum.make(shape, torch.empty(())) for _ in range(2)]
    grads = [torch.randn(shape) for _ in range(2)]
    grads[0][0] = 0.0
    momentum.direction(grads, states, 1)
    assert [state["seeded"] for state in states] == [0, 1]
    assert not states[0]["exp_avg_r"][0].any()
    momentum.direction([torch.randn(shape)], states[:1], 2)
    assert states[0]["seeded"] == 1


@pytest.mark.parametrize("r", [1, 64, 65, 205])
def test_triangular_matrices_are_inverted_by_blocks(r):
    """To working precision, with zeros where they were."""
    rows = torch.randn(2, r, r + 5, dtype=torch.float64)
    lower = torch.linalg.cholesky(rows @ rows.mT)
    found = lowrank.inverted(lower)
    torch.testing.assert_close(found @ lower, torch.eye(r, dtype=torch.float64).expand(2, r, r))
    assert not found.triu(1).any()
