"""On a CUDA device: the same numbers as on the CPU, and no step that waits for the device."""

import copy
import warnings

import pytest
import torch
import yaml
from torch import nn

from lightning_adapm import AdaLomo, AdaPM, Lomo, PartialMuon
from lightning_adapm.moments import orthogonal as reference
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.report.plan import cached_bytes
from lightning_adapm.report.tables import read_bytes
from lightning_adapm.step import kernels, nonfinite, orthogonal
from lightning_adapm.step.recorder import MOST_BYTES
from lightning_adapm.step.rounding import StochasticRounding, Stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 160, batch_first=True)
    blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return nn.ModuleDict({"embed": nn.Embedding(50, 64), "blocks": blocks, "lm_head": nn.Linear(64, 40)}).to(dtype)


def gradients(net, step):
    """The same on every device: drawn on the CPU."""
    generator = torch.Generator().manual_seed(step)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param)


def step_without_waiting(optimizer, may_wait):
    """A step in which the host's waiting for the GPU is an error, except where it may."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_the_same_weights_as_on_a_cpu(second_moment, dtype, tolerance):
    nets = [model(dtype), model(dtype).cuda()]
    for net in nets:
        optimizer = AdaPM(
            net.named_parameters(), rank=3, state_dtype=None, update_proj_gap=5, second_moment=second_moment
        )
        for step in range(22):
            gradients(net, step)
            if step == 7:
                net["lm_head"].weight.grad[0, 0] = float("inf")
            optimizer.step()
        assert optimizer.nonfinite_gradients() == {"lm_head.weight": 1}
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert (p - q.cpu()).norm() <= tolerance * p.norm(), name


NEIGHBORS = {
    "PartialMuon": (PartialMuon, {"rank": 3, "update_proj_gap": 3}),
    "Muon": (PartialMuon, {"momentum": "full"}),
    "AdaLomo": (AdaLomo, {"update_in_backward": False}),
    "Lomo": (Lomo, {"update_in_backward": False}),
}


@pytest.mark.parametrize("name", NEIGHBORS)
def test_the_neighbors_move_as_on_a_cpu(monkeypatch, name):
    """Relative to what they moved. Products of Newton-Schulz are in bfloat16 here, and in float32 there."""
    make, options = NEIGHBORS[name]
    nets, start = [model(), model().cuda()], model()
    for net in nets:
        optimizer = make(net.named_parameters(), lr=1e-2, **options)
        for step in range(8):
            gradients(net, step)
            if step == 5:
                net["lm_head"].weight.grad[0, 0] = float("inf")
            optimizer.step()
    assert "kernels" in {row.path for row in optimizer.step_paths()}
    for (key, p), q, before in zip(nets[0].named_parameters(), nets[1].parameters(), start.parameters(), strict=True):
        tolerance = 0.05 if make is PartialMuon else 1e-4
        assert (p - q.cpu()).norm() <= tolerance * (p - before).norm(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NEIGHBORS)
def test_no_step_of_the_neighbors_waits_for_the_device(name, dtype):
    """Watched or not: a monitor changes no bit."""
    make, options = NEIGHBORS[name]
    weights = []
    for probe in (None, ResidualProbe()):
        net = model(dtype).cuda()
        optimizer = make(net.named_parameters(), **options)
        optimizer.observer = probe
        for step in range(7):
            gradients(net, step)
            step_without_waiting(optimizer, may_wait=step == 0)
        weights.append([param.detach() for param in net.parameters()])
    assert all(map(torch.equal, *weights)) and all(param.isfinite().all() for param in weights[0])


@pytest.mark.parametrize("shape", [(3, 2048, 2048), (2, 512, 2048), (2, 2048, 512), (2, 1000, 777), (3, 100, 130)])
def test_newton_schulz_by_symmetric_products(shape):
    """In bfloat16, next to the plain form in float64; and one product of columns, with what is added."""
    matrices = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    matrices /= matrices.norm(dim=(-2, -1), keepdim=True)
    found = orthogonal.iterated(matrices.bfloat16(), 5).double()
    expected = reference._plain(matrices.double(), 5)
    assert (found - expected).norm() < 0.05 * expected.norm()
    given = matrices.bfloat16()
    added = given.mT @ given
    product = orthogonal.symmetric(given.mT, given.mT, added, alpha=0.5, beta=2.0).double()
    expected = 0.5 * given.double().mT @ given.double() + 2 * added.double()
    assert (product - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_after_the_first_waits_for_the_device(second_moment, dtype):
    """Neither a normal step, nor a refresh, nor one with a gradient that is not finite."""
    net = model(dtype).cuda()
    optimizer = AdaPM(net.named_parameters(), rank=3, state_dtype=None, update_proj_gap=3, second_moment=second_moment)
    for step in range(12):
        gradients(net, step)
        if step == 5:
            net["lm_head"].weight.grad[0, 0] = float("nan")
        step_without_waiting(optimizer, may_wait=step == 0)
    assert all(param.isfinite().all() for param in net.parameters())


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_monitor_changes_no_bit_and_waits_for_nothing(second_moment, dtype):
    weights = []
    for watched in (False, True):
        net = model(dtype).cuda()
        optimizer = AdaPM(
            net.named_parameters(), rank=3, state_dtype=None, update_proj_gap=3, second_moment=second_moment
        )
        probe = optimizer.observer = ResidualProbe() if watched else None
        for step in range(7):
            gradients(net, step)
            step_without_waiting(optimizer, may_wait=step == 0)
        weights.append([param.detach() for param in net.parameters()])
        paths = {row.path for row in optimizer.step_paths()}
    assert all(map(torch.equal, *weights)) and paths == {"kernels"}
    assert any("stationarity" in reading.figures for reading in probe.read())


def test_first_steps_refreshes_and_monitors_hold_no_matrix():
    """Above the second step, which does none of it; the matrix takes 512 MiB in float32."""
    weight = nn.Parameter(torch.randn(65536, 2048, device="cuda", dtype=torch.bfloat16))
    optimizer = AdaPM([("lm_head.weight", weight)], rank=16, state_dtype=None, update_proj_gap=2, second_moment="block")
    optimizer._make_state(weight)
    peaks = {}
    for name, probe in {"first": None, "plain": None, "refresh": None, "watched": ResidualProbe()}.items():
        weight.grad, optimizer.observer = torch.randn_like(weight), probe
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        optimizer.step()
        peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
    assert all(peak - peaks["plain"] < 160 for peak in peaks.values()), peaks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1000,), (300, 1000), (3, 100, 200)])
def test_parameters_are_rounded_as_on_a_cpu(dtype, shape):
    """Bit by bit: kernels draw the same numbers, and round subnormal and large values, infinities and NaN alike."""
    generator = torch.Generator().manual_seed(0)
    number = 2 * torch.Size(shape).numel()
    values = torch.randn(number, generator=generator) * torch.logspace(-10, 5, number)
    values[::50] = torch.tensor([float("inf"), float("nan"), 7e4, 3.4e38]).repeat(number)[: len(values[::50])]
    values = list(values.view(2, *shape).unbind())
    rounding = StochasticRounding((Stream(0x9E3779B9, 7, 0), Stream(3, 0x85A308D3, 2**32 - 11)), 12345)
    expected = [torch.zeros(shape, dtype=dtype) for _ in values]
    params = [param.cuda() for param in expected]
    negative = [-value.cuda() for value in values]  # kernels hold addresses only
    directions = kernels.Matrices.of(negative)
    divisors = kernels.Divisors(torch.ones(len(directions.addresses), directions.shape[0], device="cuda"), 1.0, 0.0)
    kernels.move(params, directions, None, None, None, divisors, 1.0, 1.0, 0.0, None, rounding)
    rounding.write(expected, [value.clone() for value in values])
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param.cpu(), other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_keep_a_float32_state(dtype):
    net = model(dtype).cuda()
    optimizer = AdaPM(net.named_parameters(), rank=3, state_dtype=None)
    for step in range(12):
        gradients(net, step)
        optimizer.step()
    assert all(param.isfinite().all() for param in net.parameters())
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert {value.dtype for value in held} == {torch.float32}


def test_tf32_does_not_reach_the_orthonormalization():
    """litgpt and Lightning switch TF32 on; the bases stay orthonormal to float32's precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        net = model().cuda()
        optimizer = AdaPM(net.named_parameters(), rank=8, state_dtype=None, update_proj_gap=2)
        for step in range(9):
            gradients(net, step)
            optimizer.step()
    finally:
        torch.set_float32_matmul_precision(before)
    bases = [value for state in optimizer.state.values() for key, value in state.items() if key.endswith("exp_avg_r")]
    assert bases
    for basis in bases:
        torch.testing.assert_close(basis @ basis.mT, torch.eye(8, device="cuda"), rtol=0, atol=2e-6)


def test_a_state_saved_on_a_gpu_loads_on_a_cpu(tmp_path):
    net = model().cuda()
    optimizer = AdaPM(net.named_parameters(), rank=3, state_dtype=None)
    gradients(net, 0)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(net).cpu()
    loaded = AdaPM(twin.named_parameters(), rank=3, state_dtype=None)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value).cpu(), torch.as_tensor(loaded.state[q][key])), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "r"), [(2048, 1024, 102), (512, 2048, 26), (1000, 777, 10)])
def test_products_of_gradients(dtype, m, n, r):
    """Every time: where a compiler lets a copy overtake the product that reads it, only some come out wrong."""
    generator = torch.Generator("cuda").manual_seed(0)
    grads = [torch.randn(m, n, device="cuda", dtype=dtype, generator=generator) for _ in range(6)]
    bases = torch.randn(6, r, n, device="cuda", generator=generator).to(torch.bfloat16)
    expected = torch.stack([grad.float() @ basis.float().T for grad, basis in zip(grads, bases, strict=True)])
    for _ in range(5):
        product, reading = kernels.read(kernels.Matrices.of(grads), 6, kernels.Matrices.of([bases]), r, None)
        assert (product[..., :r] - expected).norm() < 5e-3 * expected.norm()
        torch.testing.assert_close(reading.squares, torch.stack([grad.float().square().sum(1) for grad in grads]))
        assert not reading.flaws.any()
        weights = product[..., :r].contiguous()
        combined = kernels.combine(kernels.Matrices.of(grads), weights, reading.flaws)
        summed = weights.mT @ torch.stack([grad.float() for grad in grads])
        assert (combined - summed).norm() < 5e-3 * summed.norm()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_learning_rate_on_the_device_is_read_once_per_step_and_group(in_backward):
    """Whatever the number of batches."""
    net = model().cuda()
    named = list(net.named_parameters())
    groups = [{"params": named[:5]}, {"params": named[5:], "lr": torch.tensor(1e-3, device="cuda")}]
    rate = torch.tensor(1e-2, device="cuda")
    optimizer = AdaPM(groups, lr=rate, rank=3, state_dtype=None, update_proj_gap=3, update_in_backward=in_backward)

    def closure():
        for index, param in enumerate(net.parameters()):
            (param * (index + 1)).sum().backward()

    for step in range(4):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn" if step else "default")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step(closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits = [each for each in caught if "synchronizing" in str(each.message)]
        assert len(waits) == (2 if step else 0)
        assert optimizer.param_groups[0]["lr"] is rate


@pytest.mark.parametrize("rows", [4096, 16384])
def test_one_head_of_thousands_of_rows(rows):
    nets = [nn.ModuleDict({"q_proj": nn.Linear(96, rows, bias=False)}) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].cuda()
    for net in nets:
        group = {"params": net.named_parameters(), "n_head": 1}
        optimizer = AdaPM(
            [group], rank=5, state_dtype=None, second_moment="block", update_proj_gap=3, weight_decay=0, eps=1
        )
        for step in range(5):
            gradients(net, step)
            optimizer.step()
    p, q = (net["q_proj"].weight for net in nets)
    assert (p - q.cpu()).norm() <= 2e-3 * p.norm()


def test_gradients_that_are_all_broken_are_noticed_without_waiting():
    net = model().cuda()
    optimizer = AdaPM(net.named_parameters(), rank=3, state_dtype=None)
    gradients(net, 0)
    optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(40):
            for param in net.parameters():
                param.grad = torch.full_like(param, float("nan"))
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert sum("every gradient held an infinity" in str(each.message) for each in caught) == 1


def test_autograd_sees_a_step():
    layer = nn.Linear(64, 32, bias=False, device="cuda")
    optimizer = AdaPM([("mlp.weight", layer.weight)])
    loss = layer(torch.ones(2, 64, device="cuda", requires_grad=True)).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("state_dtype", ["float16", "bfloat16", "float64", "int8"])
@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
def test_state_of_any_dtype(state_dtype, second_moment):
    net = model().cuda()
    optimizer = AdaPM(net.named_parameters(), rank=8, state_dtype=state_dtype, second_moment=second_moment)
    for step in range(6):
        gradients(net, step)
        if step == 3:
            for param in net.parameters():
                param.grad *= 1e8
        optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(value.isfinite().all() for value in (*held, *net.parameters()))


def test_a_step_is_planned_within_five_percent_of_the_allocator(tmp_path):
    """Llama-3.2-1B with the memory options of the recipes for small cards; weights are drawn at random."""
    pytest.importorskip("jsonargparse", reason="recipes are read by it")
    from benchmarks import recipe_memory, recipe_training

    recipe = yaml.safe_load((recipe_memory.RECIPES / "trainer/finetune/llama-3.2-3b-full-12gb.yaml").read_text())
    recipe["model"]["init_args"]["model_name"] = "Llama-3.2-1B"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    planned = read_bytes("".join(recipe_memory.planned_step(path).split()[:2]))
    assert recipe_training.measure(path)["peak"] == pytest.approx(planned, rel=0.05)


def recorded_kinds(optimizer):
    return len(optimizer._engine._recorder._recordings)


def twins_trained(dtype, steps, before=lambda step, optimizers: None, **options):
    """Weights and state with recorded steps and without, after each step, and the optimizer that records."""
    nets = [model(dtype).cuda() for _ in range(2)]
    optimizers = [AdaPM(net.named_parameters(), **{"rank": 3, "update_proj_gap": 4} | options) for net in nets]
    optimizers[0].most_recorded_bytes, optimizers[1].most_recorded_bytes = MOST_BYTES, 0
    elsewhere = []
    for step in range(steps):
        before(step, optimizers)
        for net, optimizer in zip(nets, optimizers, strict=True):
            elsewhere.append([param.grad for param in net.parameters() if step % 3])  # the next lie in other memory
            gradients(net, step)
            if step % 7 == 5:
                net["lm_head"].weight.grad[0, 0] = float("nan")
            if step == 14:
                net["embed"].weight.grad = None
            step_without_waiting(optimizer, may_wait=step == 0)
        for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(p, q), (step, name)
            for key, value in optimizers[1].state[q].items():
                assert torch.equal(torch.as_tensor(optimizers[0].state[p][key]), torch.as_tensor(value)), (step, key)
    assert optimizers[0].nonfinite_gradients() == optimizers[1].nonfinite_gradients()
    return optimizers[0]


@pytest.mark.parametrize("second_moment", ["elementwise", "block", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_steps_are_those_that_are_launched(second_moment, dtype):
    """Bit by bit and without waiting, with another learning rate in every step and gradients in other places."""
    kinds = []

    def before(step, optimizers):
        kinds.append(recorded_kinds(optimizers[0]))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)

    optimizer = twins_trained(dtype, 28, before, second_moment=second_moment)
    assert max(kinds[:14]) == 3 and recorded_kinds(optimizer) > 0  # ordinary steps, and refreshes of either phase
    assert {row.launches for row in optimizer.step_paths()} == {"replayed"}
    assert 0 < optimizer.cached_bytes() <= cached_bytes(optimizer)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_recorded_steps_with_smaller_state(state_dtype):
    assert recorded_kinds(twins_trained(torch.float32, 12, state_dtype=state_dtype, second_moment="block")) == 3


def test_recorded_steps_after_loading_a_state():
    def before(step, optimizers):
        if step == 9:
            for optimizer in optimizers:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                assert recorded_kinds(optimizer) == 0

    assert recorded_kinds(twins_trained(torch.float32, 14, before, second_moment="block")) > 0


def test_gradients_of_any_shapes_are_found_to_be_finite_together():
    """A sum of large finite numbers overflows; what a process holds of a gradient may be nothing."""
    values = [[1.0, 2.0], [], [1.0, float("nan"), 2.0], [3e38, 3e38, 3e38], [-float("inf"), 1.0], [float("nan")] * 9999]
    grads = [
        torch.tensor(each, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16) for each in values
    ]
    assert nonfinite._each_finite(grads).tolist() == [True, True, False, True, False, False] * 2
    assert nonfinite._each_finite(grads[1:2]).tolist() == [True]
