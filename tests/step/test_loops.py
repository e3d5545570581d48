"""Compiled loops of a step on a CPU: the same training as without them.

Numba runs them as plain Python here; with ``NUMBA_DISABLE_JIT=0`` it compiles them.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import relative_difference
from torch import nn

from lightning_adapm import AdamMini, AdaPM, Lomo, PartialMuon
from lightning_adapm.moments import tiles
from lightning_adapm.moments.base import Denominators
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.step import loops

SHAPES = {
    "wte.weight": (9, 20),
    "q_proj.weight": (6, 300),  # rows of one block of codes and of a rest
    "v_proj.weight": (6, 22),
    "mlp.up.weight": (13, 24),
    "mlp.experts": (2, 9, 14),
    "v_proj.bias": (6,),
}
LOOPS, VECTORS = "torch and loops", "no kernels on cpu, no loops for vectors"


@pytest.fixture
def looped(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(loops, "runs_on", lambda device: True)


def stepped(make=AdaPM, steps=5, observer=None, graph=False, **options):
    """Weights, state and optimizer after some steps, of which one has a gradient that is not finite."""
    torch.manual_seed(0)
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    roles = {"experts": "mlp", "wte": "embedding"}
    group = {"params": list(params.items()), "n_head": 2, "n_query_groups": 2}
    optimizer = make([group], roles=roles, **{"lr": 1e-2, "weight_decay": 0.1} | options)
    optimizer.observer = observer
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator)
            if step == 3 and param.dim() == 2:
                param.grad[-1, -2] = float("nan")
            param.grad.requires_grad_(graph)
        optimizer.step()
    state = [v.double().flatten() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return torch.cat([param.detach().flatten() for param in params.values()]), torch.cat(state), optimizer


LOW_RANK = {"update_proj_gap": 3, "rank": 5, "clip_threshold": 0.7}
CASES = {
    "elementwise": (AdaPM, LOW_RANK),
    "block": (AdaPM, LOW_RANK | {"second_moment": "block"}),
    "factored": (AdaPM, LOW_RANK | {"second_moment": "factored", "state_dtype": None}),
    "AdamW": (AdaPM, {"momentum": "full"}),
    "AdamMini": (AdamMini, {}),
    "Lomo": (Lomo, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_as_without_loops(looped, monkeypatch, case):
    """With refreshes, momentum in eight bits, stacks and heads; a code may be the next one, if in 32-bit's last bit."""
    make, options = CASES[case]
    weights, state, optimizer = stepped(make, **options)
    paths = {(row.path, row.reason) for row in optimizer.step_paths()}
    assert paths == {(LOOPS, "no kernels on cpu"), ("torch", VECTORS)}
    monkeypatch.setattr(loops, "runs_on", lambda device: False)
    expected, expected_state, reference = stepped(make, **options)
    assert {row.path for row in reference.step_paths()} == {"torch"}
    assert relative_difference(weights, expected) < 2e-6
    assert relative_difference(state, expected_state) < 1e-3
    assert optimizer.nonfinite_gradients() == reference.nonfinite_gradients() != {}


@pytest.mark.parametrize("case", ["elementwise", "block"])
def test_a_monitor_keeps_every_bit(looped, monkeypatch, case):
    """And has the figures that it has of torch's step; tiles are smaller than matrices."""
    make, options = CASES[case]
    monkeypatch.setattr(tiles, "TILE_NUMEL", 50)
    plain = stepped(make, **options)
    probe, reference = ResidualProbe(), ResidualProbe()
    watched = stepped(make, observer=probe, **options)
    assert torch.equal(watched[0], plain[0]) and torch.equal(watched[1], plain[1])
    monkeypatch.setattr(loops, "runs_on", lambda device: False)
    stepped(make, observer=reference, **options)
    for found, expected in zip(probe.read(), reference.read(), strict=True):
        assert found[:3] == expected[:3]
        assert found.figures == pytest.approx(expected.figures, rel=2e-3, abs=1e-5)


def test_threads_share_rows(looped, monkeypatch):
    """Each has some of every matrix, and of every product; only sums over columns are added up in another order."""
    make, options = CASES["factored"]
    expected = stepped(make, **options)
    monkeypatch.setattr(loops, "_FEWEST", 1)
    monkeypatch.setattr(loops, "_CACHED", 24)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    found = stepped(make, graph=True, **options)  # as after backward(create_graph=True)
    assert relative_difference(found[0], expected[0]) < 2e-6
    assert relative_difference(found[1], expected[1]) < 1e-3


def test_torch_has_its_threads_back(looped, monkeypatch):
    """Meanwhile it has one: its others would spin where the loops run."""
    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr(loops, "move", lambda *_, **__: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        stepped(steps=1)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_an_interrupt_leaves_torch_its_threads(looped, monkeypatch):
    threads, real = torch.get_num_threads(), torch.set_num_threads

    def interrupted(number):
        real(number)
        if number == 1:
            raise KeyboardInterrupt

    try:
        real(2)
        monkeypatch.setattr(torch, "set_num_threads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stepped(steps=1)
        assert torch.get_num_threads() == 2
    finally:
        real(threads)


def test_a_thread_steps_on_after_the_main_one_has_ended(looped, monkeypatch):
    """Python then starts no other threads: this one does the work of all, to the same bits."""
    make, options = CASES["elementwise"]
    expected = stepped(make, **options)
    ended = ThreadPoolExecutor(1)
    ended.shutdown()
    monkeypatch.setattr(loops, "_pool", lambda process, threads: ended)
    monkeypatch.setattr(loops, "_FEWEST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    found = stepped(make, **options)
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("case", ["elementwise", "factored"])
def test_any_default_dtype(looped, case):
    make, options = CASES[case]
    params = [("mlp.weight", nn.Parameter(torch.randn(13, 24)))]
    optimizer = make(params, roles={"mlp": "mlp"}, **options)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for _ in range(4):  # with and without a refresh
            params[0][1].grad = torch.ones(13, 24, dtype=torch.float32)
            optimizer.step()
    finally:
        torch.set_default_dtype(default)
    assert params[0][1].isfinite().all()


def test_a_process_may_hold_no_row(looped):
    rows, factors = torch.empty(0, 8), (torch.empty(1, 0, 2), torch.empty(1, 2, 8))
    loops.move([rows], [rows], Denominators([torch.empty(0, 1)], 1.0, 0.0), rate=1.0, keep=1.0, factors=factors)


def test_a_step_by_loops_is_seen_by_autograd(looped):
    param = nn.Parameter(torch.randn(4, 8))
    used = (param * param).sum()
    param.grad = torch.ones(4, 8)
    AdaPM([("mlp.weight", param)], roles={"mlp": "mlp"}).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        used.backward()


@pytest.mark.parametrize(
    ("options", "dtype", "reason"),
    [
        ({"state_dtype": "bfloat16", "momentum": "full"}, torch.float32, "no loops for momentum in Storage"),
        ({}, torch.bfloat16, "no loops for this dtype or memory layout"),
        (
            {"debias": False, "momentum": "compact"},
            torch.float32,
            "no loops for low-rank momentum without its residual",
        ),
    ],
)
def test_what_loops_do_not_support_says_so(looped, options, dtype, reason):
    param = nn.Parameter(torch.randn(4, 8, dtype=dtype))
    optimizer = AdaPM([("mlp.weight", param)], roles={"mlp": "mlp"}, **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    (row,) = optimizer.step_paths()
    assert row.path == "torch" and reason in row.reason


def test_orthogonal_updates_are_not_taken_for_none(looped):
    """Attention outputs have no momentum by default, but matrices that are orthogonalized nevertheless."""
    param = nn.Parameter(torch.zeros(8, 16))
    optimizer = PartialMuon([("self_attn.o_proj.weight", param)], lr=1.0)
    param.grad = torch.randn(8, 16)
    optimizer.step()
    (row,) = optimizer.step_paths()
    assert (row.path, row.reason) == ("torch", "no kernels on cpu, no loops for NoMomentum with Orthogonal")
    values = torch.linalg.svdvals(param.detach()) / (0.2 * 16**0.5)
    assert values.min() > 0.6 and values.max() < 1.25


def test_without_numba_steps_are_torchs(monkeypatch):
    monkeypatch.setattr(loops, "_found", lambda: False)
    param = nn.Parameter(torch.randn(4, 8))
    (row,) = AdaPM([("mlp.weight", param)], roles={"mlp": "mlp"}).step_paths()
    assert (row.path, row.reason) == ("torch", "no kernels on cpu")
