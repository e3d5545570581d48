"""Variants of AdaPM that studies try: their bases, residuals, scales and dampings."""

import pytest
import torch

from benchmarks.studies.decoder import Shape
from benchmarks.studies.optimizers import Parameters, build, resolve
from benchmarks.studies.setting import Setting
from benchmarks.studies.trials import ExactSVD, GradientDescent, Reprojected, Scaled, Trial, average
from benchmarks.studies.updated import MOMENTS, UpdatedLoRAPre
from lightning_adapm.moments.first import LowRankMomentum

TINY = Setting(Shape(layers=1, width=16, n_head=2, context=8), steps=4, batch=2, val_windows=4)


def low_rank(kind=LowRankMomentum, gap=3):
    return kind(rank=2, beta1=0.9, update_proj_gap=gap)


def stepped(momentum, grads):
    """The state and the last direction, times its scale."""
    state = momentum.make(grads[0].shape, grads[0])
    for step, grad in enumerate(grads, 1):
        used = momentum.direction([grad], [state], step).multiplied()
    return state, used.scale * used.tensors[0]


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_the_exact_basis_is_that_of_an_svd(shape):
    torch.manual_seed(0)
    grads = [torch.randn(shape) for _ in range(4)]  # refreshed at 1 and 4
    before, _ = stepped(low_rank(ExactSVD), grads[:3])
    after, _ = stepped(low_rank(ExactSVD), grads)
    mean = average(grads[3][None], before["exp_avg_l"][None], before["exp_avg_r"][None], 0.9)[0]
    wanted = torch.linalg.svd(mean).Vh[:2]
    torch.testing.assert_close(after["exp_avg_r"].mT @ after["exp_avg_r"], wanted.mT @ wanted, atol=1e-4, rtol=1e-4)


def test_gradient_descent_moves_the_basis_towards_that_of_the_svd():
    torch.manual_seed(0)
    grads = [torch.randn(12, 8) for _ in range(4)]
    before, _ = stepped(low_rank(GradientDescent), grads[:3])
    after, _ = stepped(low_rank(GradientDescent), grads)
    mean = average(grads[3][None], before["exp_avg_l"][None], before["exp_avg_r"][None], 0.9)[0]
    best, _ = stepped(low_rank(ExactSVD), grads)
    held = [(mean @ state["exp_avg_r"].mT).norm().item() for state in (before, after, best)]
    assert held[0] < held[1] <= (torch.linalg.svdvals(mean)[:2].norm() + 1e-5)
    torch.testing.assert_close(after["exp_avg_r"] @ after["exp_avg_r"].mT, torch.eye(2), atol=1e-5, rtol=1e-5)


def test_a_projected_correction_keeps_a_constant_gradient():
    torch.manual_seed(0)
    grad = torch.randn(12, 8)
    for steps in (1, 2, 3, 4, 5, 8):
        _, used = stepped(low_rank(Reprojected), [grad] * steps)
        torch.testing.assert_close(used, grad, atol=1e-5, rtol=1e-5)
    noise = [torch.randn(12, 8) for _ in range(5)]
    theirs, ours = (stepped(low_rank(kind), noise)[1] for kind in (LowRankMomentum, Reprojected))
    assert not torch.allclose(theirs, ours)


def test_a_smaller_residual_scales_what_the_subspace_does_not_see_alone():
    torch.manual_seed(0)
    grads = [torch.randn(12, 8) for _ in range(3)]
    state, plain = stepped(low_rank(), grads)
    _, half = stepped(Scaled(low_rank(), 1.0, residual=0.5), grads)
    _, both = stepped(Scaled(low_rank(), 0.25, residual=0.5), grads)
    inside = state["exp_avg_r"].mT @ state["exp_avg_r"]
    torch.testing.assert_close(half @ inside, plain @ inside, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half, plain - 0.5 * (plain - plain @ inside), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both, 0.25 * half)


def test_a_matched_residual_shrinks_as_the_average_does():
    torch.manual_seed(0)
    grad = torch.randn(12, 8)
    _, constant = stepped(Scaled(low_rank(), 1.0, residual="matched"), [grad] * 3)
    torch.testing.assert_close(constant, grad, atol=1e-5, rtol=1e-5)  # nothing shrinks where there is no noise
    grads = [torch.randn(12, 8) for _ in range(30)]
    state, plain = stepped(low_rank(gap=100), grads)
    _, matched = stepped(Scaled(low_rank(gap=100), 1.0, residual="matched"), grads)
    inside = state["exp_avg_r"].mT @ state["exp_avg_r"]
    average = state["exp_avg_l"].norm() / (1 - 0.9**30) / (grads[-1] @ state["exp_avg_r"].mT).norm()
    assert 0.1 < average < 0.5
    torch.testing.assert_close(matched - matched @ inside, average * (plain - plain @ inside), atol=1e-5, rtol=1e-4)


def test_scaling_a_policy_scales_its_roles_alone():
    updates = []
    for options in ({}, {"scale": {"none": 0.5}}):
        torch.manual_seed(0)
        model = TINY.shape.build()
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        trial = resolve("trial", {"momentum": "paper", "clip_threshold": None, **options})
        optimizer = build(trial, Parameters.of(model), 1e-3)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        model(torch.arange(8)[None]).logsumexp(dim=-1).sum().backward()
        optimizer.step()
        updates.append({name: before[name] - param for name, param in model.named_parameters()})
    for name, plain in updates[0].items():
        factor = 0.5 if name in ("wte.weight", "wpe.weight", "blocks.0.attn.proj.weight") else 1.0
        torch.testing.assert_close(updates[1][name], factor * plain, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("momentum", ["none", "low_rank"])
def test_a_damped_update_divides_by_the_second_moment_and_what_no_momentum_averages(momentum):
    torch.manual_seed(0)
    weight, lr, decay, damping = torch.nn.Parameter(torch.randn(24, 16)), 1e-2, 0.1, 2.0
    options = {"betas": (0.5, 0.9), "rank": 0.25, "update_proj_gap": 10, "clip_threshold": None, "state_dtype": None}
    trial = Trial([("mlp.weight", weight)], lr=lr, weight_decay=decay, momentum=momentum, damping=damping, **options)
    expected, average, left = weight.detach().clone(), torch.zeros(24, 16), torch.zeros(24, 4)
    for step in range(1, 4):
        weight.grad = grad = torch.randn(24, 16)
        trial.step()
        average = 0.9 * average + 0.1 * grad.square()
        basis = trial.state[weight]["exp_avg_r"] if momentum == "low_rank" else torch.zeros(4, 16)
        left = 0.5 * left + 0.5 * grad @ basis.mT
        outside = grad - grad @ basis.mT @ basis
        inside = left / (1 - 0.5**step) @ basis
        root = (average / (1 - 0.9**step) + damping * outside.square()).sqrt()
        expected = (1 - lr * decay) * expected - lr * (outside + inside) / (root + 1e-8)
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("moments", [MOMENTS, MOMENTS[:1], MOMENTS[1:]], ids=" and ".join)
def test_updated_factors_are_those_that_a_step_leaves_behind(moments):
    torch.manual_seed(0)
    weight, lr, betas = torch.nn.Parameter(torch.randn(12, 8, dtype=torch.float64)), 1e-2, (0.9, 0.95)
    trial = UpdatedLoRAPre([("mlp.weight", weight)], lr=lr, betas=betas, rank=2, weight_decay=0.0, moments=moments)
    before = dict.fromkeys(("exp_avg_l", "exp_avg_sq_l"), torch.zeros(12, 2)) | dict.fromkeys(
        ("exp_avg_r", "exp_avg_sq_r"), torch.zeros(2, 8)
    )
    for step in range(1, 4):
        expected, weight.grad = weight.detach().clone(), torch.randn(12, 8, dtype=torch.float64)
        trial.step()
        after = {key: value.double() for key, value in trial.state[weight].items()}
        first, second = (
            (after if name in moments else before)[f"{key}_l"].double()
            @ (after if name in moments else before)[f"{key}_r"].double()
            for name, key in zip(MOMENTS, ("exp_avg", "exp_avg_sq"), strict=True)
        )
        average = (0.9 * first + 0.1 * weight.grad) / (1 - 0.9**step)
        squares = (0.95 * second.square() + 0.05 * weight.grad.square()) / (1 - 0.95**step)
        torch.testing.assert_close(weight.detach(), expected - lr * average / (squares.sqrt() + 1e-8))
        before = {key: value.clone() for key, value in after.items()}
