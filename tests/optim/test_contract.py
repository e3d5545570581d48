"""What code that holds a ``torch.optim.Optimizer`` relies on. ``torch.optim.AdamW`` passes too, as the reference.

Nothing here is about what an optimizer computes. The optimizers are found among the package's exports.
"""

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from optimizers import CASES, REFERENCE
from torch import nn
from torch.optim import lr_scheduler
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import SWALR, AveragedModel

ALL = {"AdamW": REFERENCE, **CASES}

pytestmark = [
    pytest.mark.filterwarnings("ignore:update_in_backward=True frees no gradient early"),
    pytest.mark.filterwarnings("ignore:.* found no gradient on any of its parameters"),
]


@pytest.fixture(params=ALL)
def case(request):
    return ALL[request.param]


class Net(nn.Module):
    """Regression; the names show roles."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.mlp = nn.LayerNorm(6), nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))

    def forward(self, inputs):
        return self.mlp(self.norm(inputs))


def loss_of(model, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randn(16, n, generator=generator, dtype=dtype) for n in (6, 5))
    return (model(inputs) - targets).square().mean()


def set_gradients(model, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)


def train(model, optimizer, steps=3, first=0):
    """As most code does; the losses."""
    losses = []
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, dtype)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(case, steps=3, **options):
    model = Net()
    optimizer = case(model.named_parameters(), **options)
    train(model, optimizer, steps)
    return model, optimizer


def values(model):
    return [param.detach().clone() for param in model.parameters()]


def equal(one, other):
    one, other = (list(each.parameters()) if isinstance(each, nn.Module) else each for each in (one, other))
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def tensors_in(value):
    """Tensors in nested dicts and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for each in value.values() for tensor in tensors_in(each)]
    return [tensor for each in value for tensor in tensors_in(each)] if isinstance(value, (list, tuple)) else []


# ---------------------------------------------------------------------------------------------------- construction


def test_parameters_may_be_given_in_any_form(case):
    def groups(named):
        named = list(named)
        return [{"params": named[:2]}, {"params": iter(named[2:]), "lr": 1e-2}]

    forms = [lambda named: named, list, tuple, lambda named: iter(list(named)), groups]
    found = []
    for form in forms:
        model = Net()
        optimizer = case(form(model.named_parameters()))
        held = [param for group in optimizer.param_groups for param in group["params"]]
        assert all(p is q for p, q in zip(held, model.parameters(), strict=True))
        train(model, optimizer)
        found.append(model)
    assert all(equal(each, found[0]) for each in found)


def test_one_named_parameter_as_a_group(case):
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = case([{"params": [("mlp.weight", weight)]}])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert (weight != 1).all()


@pytest.mark.parametrize("params", [None, 3, torch.ones(2, 2), {torch.ones(2, 2)}], ids=["None", "3", "tensor", "set"])
def test_what_is_no_collection_of_parameters(case, params):
    with pytest.raises(TypeError):
        case([{"params": params}] if isinstance(params, set) else params)


def test_what_is_no_parameter(case):
    with pytest.raises(ValueError, match="empty parameter list"):
        case([])
    with pytest.raises(TypeError):
        case([("mlp.weight", "a string")])
    with pytest.raises(ValueError, match="non-leaf"):
        case([("mlp.weight", torch.ones(2, 2, requires_grad=True) * 2)])
    weight = torch.ones(2, 2, requires_grad=True)
    with pytest.raises((TypeError, ValueError)):
        case([("mlp.weight", weight), torch.ones(2, 2, requires_grad=True)])


def test_one_parameter_twice(case):
    weight = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        case([{"params": [("mlp.weight", weight)]}, {"params": [("mlp.weight", weight)]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        case([("mlp.weight", weight), ("mlp.weight", weight)])


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", torch.tensor(-1.0)),
        ("lr", torch.tensor([1e-3, 1e-3])),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("eps", -1e-8),
        ("weight_decay", -1),
        ("clip_threshold", -1.0),
        ("rank", 0),
        ("update_proj_gap", 0),
    ],
)
def test_options_out_of_range(case, option, wrong):
    if not case.takes(option):
        pytest.skip(f"without {option}")
    words = {"lr": "lr|learning rate", "eps": "eps", "betas": "beta"}.get(option, option)
    with pytest.raises(ValueError, match=f"(?i){words}"):
        case(Net().named_parameters(), **{option: wrong})


def test_complex_parameters(case):
    """AdamW takes them; an optimizer that does not, says so before anything is trained."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    if case is REFERENCE:
        case([("mlp.weight", weight)])
        return
    with pytest.raises(TypeError, match="mlp.weight is complex"):
        case([("mlp.weight", weight)])


def test_every_option_is_documented_and_in_every_group(case):
    documented = inspect.getdoc(case.make)
    named = [
        name for name, each in inspect.signature(case.make).parameters.items() if each.kind is not each.VAR_KEYWORD
    ]
    assert all(f"{name}" in documented for name in named)
    model = Net()
    optimizer = case([{"params": [each]} for each in model.named_parameters()])
    assert {"lr", "weight_decay"} <= set(optimizer.defaults)
    for group in optimizer.param_groups:
        assert set(optimizer.defaults) <= set(group)
        assert len(group["param_names"]) == len(group["params"])


def test_it_can_be_printed(case):
    optimizer = case(Net().named_parameters(), lr=0.125)
    assert repr(optimizer).startswith(f"{case.make.__name__} (\nParameter Group 0\n")
    assert "    lr: 0.125\n" in repr(optimizer)
    train(Net(), optimizer, 0)
    repr(copy.deepcopy(optimizer))


def test_nothing_is_left_behind(case):
    """Models and optimizers that are no longer used are freed."""
    gc.freeze()
    model, optimizer = trained(case)
    gone = [
        weakref.ref(optimizer),
        weakref.ref(model.mlp[0].weight),
        *map(weakref.ref, tensors_in(optimizer.state)),
    ]
    assert len(gone) > 2
    del model, optimizer
    gc.collect()
    assert not any(each() is not None for each in gone)


# ------------------------------------------------------------------------------------------------------------ steps


def test_steps_go_downhill(case):
    model = Net()
    optimizer = case(model.named_parameters(), lr=3e-2)
    before = loss_of(model).item()
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < before - 1e-3


def test_a_closure_is_called_once_with_gradients_and_its_loss_comes_back(case):
    model, plain, calls = Net(), Net(), []
    optimizer = case(model.named_parameters())

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert calls == [True] and loss.requires_grad
    without = case(plain.named_parameters())
    loss_of(plain).backward()
    assert without.step() is None
    assert equal(model, plain)
    optimizer.step(closure=closure)
    assert len(calls) == 2


def test_a_closure_that_fails_changes_nothing(case):
    model, optimizer = trained(case)
    before = values(model)

    def closure():
        optimizer.zero_grad()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert equal(values(model), before)
    assert torch.is_grad_enabled()
    train(model, optimizer)


def test_zero_grad(case):
    model = Net()
    optimizer = case(model.named_parameters())
    set_gradients(model)
    grads = [param.grad for param in model.parameters()]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is grad and not grad.any() for p, grad in zip(model.parameters(), grads, strict=True))
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    (loss_of(model) ** 2).backward(create_graph=True)
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad.grad_fn is None and not param.grad.requires_grad for param in model.parameters())


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
def test_no_graph_grows_through_steps(case):
    """Gradients that have a graph themselves leave none in parameters or state."""
    model = Net()
    optimizer = case(model.named_parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward(create_graph=True)
        optimizer.step()
    assert all(param.is_leaf and param.requires_grad for param in model.parameters())
    assert not any(tensor.requires_grad for tensor in tensors_in(optimizer.state))
    twin, plain = Net(), case
    train(twin, plain(twin.named_parameters()))
    assert equal(model, twin)


def test_without_any_gradient_nothing_happens(case):
    model, optimizer = trained(case)
    before, state = values(model), [tensor.clone() for tensor in tensors_in(optimizer.state)]
    optimizer.zero_grad()
    optimizer.step()
    assert equal(values(model), before)
    assert equal(tensors_in(optimizer.state), state)


def test_gradients_of_zero_move_nothing_without_decay(case):
    model = Net()
    optimizer = case(model.named_parameters(), weight_decay=0.0)
    before = values(model)
    for _ in range(3):
        set_gradients(model, scale=0.0)
        optimizer.step()
    assert equal(values(model), before)


def test_a_rate_of_zero_moves_nothing(case):
    model = Net()
    optimizer = case(model.named_parameters(), lr=0.0, weight_decay=0.1)
    before = values(model)
    train(model, optimizer)
    assert equal(values(model), before)


def test_weight_decay_is_decoupled(case):
    """It shrinks weights without a gradient's help, and is no part of the state."""
    model = Net()
    optimizer = case(model.named_parameters(), weight_decay=0.5)
    weight, before = model.mlp[0].weight, model.mlp[0].weight.detach().clone()
    set_gradients(model, scale=0.0)
    optimizer.step()
    shrunk = weight.detach() / before
    torch.testing.assert_close(shrunk, shrunk[0, :1].expand_as(shrunk))
    assert 0.9 < shrunk[0, 0] < 1


def test_parameters_without_gradients_stay_and_count_no_step(case):
    model, optimizer = trained(case)
    weight, other = model.mlp[0].weight, model.mlp[2].weight
    before, count = weight.detach().clone(), float(optimizer.state[weight]["step"])
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        weight.grad = None
        optimizer.step()
    assert torch.equal(weight, before)
    assert float(optimizer.state[weight]["step"]) == count == 3
    assert float(optimizer.state[other]["step"]) == count + 2
    train(model, optimizer)
    assert not torch.equal(weight, before)
    assert float(optimizer.state[weight]["step"]) == count + 3


def test_frozen_parameters_stay(case):
    model = Net()
    model.mlp[0].requires_grad_(False)
    optimizer = case(model.named_parameters())
    before = model.mlp[0].weight.detach().clone()
    train(model, optimizer)
    assert torch.equal(model.mlp[0].weight, before)
    assert not tensors_in(optimizer.state.get(model.mlp[0].weight, {}))
    model.mlp[0].requires_grad_(True)
    train(model, optimizer)
    assert not torch.equal(model.mlp[0].weight, before)


def test_maximize_is_the_negated_objective(case):
    if not case.takes("maximize"):
        pytest.skip("without maximize")
    up, down = Net(), Net()
    options = {"weight_decay": 0.1}
    optimizers = case(up.named_parameters(), maximize=True, **options), case(down.named_parameters(), **options)
    for step in range(3):
        for sign, model, optimizer in zip((1, -1), (up, down), optimizers, strict=True):
            optimizer.zero_grad()
            (sign * loss_of(model, step)).backward()
            optimizer.step()
    assert equal(up, down)


def test_gradients_are_left_as_they_were(case):
    """Whoever logs their norm after the step sees what backward left."""
    model = Net()
    optimizer = case(model.named_parameters(), weight_decay=0.1)
    for step in range(4):
        set_gradients(model, step)
        grads = [(param.grad, param.grad.clone()) for param in model.parameters()]
        optimizer.step()
        for param, (grad, kept) in zip(model.parameters(), grads, strict=True):
            assert param.grad is grad and torch.equal(grad, kept)


def test_parameters_change_in_place_and_autograd_sees_it(case):
    model = Net()
    optimizer = case(model.named_parameters())
    places = [(param, param.data_ptr(), param._version) for param in model.parameters()]
    set_gradients(model)
    optimizer.step()
    for param, place, version in places:
        assert param.data_ptr() == place and param._version > version
    loss = loss_of(model).square()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def strided(tensor):
    """The same numbers with gaps between them, the first dimension the fastest."""
    wide = torch.empty(*tensor.shape[::-1], 2, dtype=tensor.dtype)[..., 0].permute(*range(tensor.dim())[::-1])
    return wide.copy_(tensor)


@pytest.mark.parametrize("where", ["parameters", "gradients", "both"])
def test_strides_of_parameters_and_gradients(case, where):
    dense, model = Net(), Net()
    if where != "gradients":
        for param in model.parameters():
            param.data = strided(param.data)
    optimizers = case(dense.named_parameters()), case(model.named_parameters())
    for step in range(4):
        for each, optimizer in zip((dense, model), optimizers, strict=True):
            set_gradients(each, step)
            if each is model and where != "parameters":
                for param in model.parameters():
                    param.grad = strided(param.grad)
            optimizer.step()
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_shapes_of_parameters(case):
    for shape in [(), (1,), (7,), (1, 1), (4, 3), (2, 3, 4), (0,), (0, 3), (3, 0)]:
        param = nn.Parameter(torch.ones(shape))
        optimizer = case([{"params": [("mlp.weight", param)], **({} if case is REFERENCE else {"role": "mlp"})}])
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert (param < 1).all() and param.shape == shape
        assert param.numel() == 0 or float(optimizer.state[param]["step"]) == 2
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


def test_dtypes_may_be_mixed(case):
    """Each parameter as if it were alone."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    together = [nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6).to(dtype)) for dtype in dtypes]
    alone = copy.deepcopy(together)
    optimizers = [case([(f"mlp.{index}.weight", param) for index, param in enumerate(together)])]
    optimizers += [case([(f"mlp.{index}.weight", param)]) for index, param in enumerate(alone)]
    for step in range(4):
        grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for param in (*together, *alone):
            param.grad = grad.to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(together, alone, strict=True))


def test_sparse_gradients_are_refused_by_name(case):
    embedding = nn.Embedding(7, 4, sparse=True)
    optimizer = case([("embed_tokens.weight", embedding.weight)])
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_the_same_run_twice_is_the_same(case):
    """Whatever a program has seeded; and no random number is taken from it."""
    torch.manual_seed(1)
    first, _ = trained(case, 6)
    second = Net()
    optimizer = case(second.named_parameters())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    train(second, optimizer, 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal(first, second)


def test_the_default_dtype_changes_nothing(case):
    expected, _ = trained(case)
    model = Net()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = case(model.named_parameters())
        train(model, optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(model, expected)
    assert all(tensor.dtype != torch.float64 for tensor in tensors_in(optimizer.state) if tensor.dim())


def test_autocast_around_a_step_changes_nothing(case):
    expected, _ = trained(case)
    model = Net()
    optimizer = case(model.named_parameters())
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step()
    assert equal(model, expected)


def test_gradient_scaler(case):
    """A scaled step is a step, and a step with an overflow none."""
    expected = Net()
    optimizer = case(expected.named_parameters())
    train(expected, optimizer)
    model = Net()
    optimizer, scaler = case(model.named_parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, min(step, 2))).backward()
        if step == 3:
            model.mlp[0].weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
    assert equal(model, expected)
    assert scaler.get_scale() == 2.0


def test_many_steps_keep_what_is_kept(case):
    """What is alive does not grow with steps, also where options of a group change in every one."""
    has_betas = "betas" in inspect.signature(case.make).parameters

    def several(first, last):
        for step in range(first, last):
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = 1e-3 * (1 + step / 7), 1e-2 / (1 + step)
                if has_betas:
                    group["betas"] = (0.9 - 1e-3 * step, 0.99)
            set_gradients(model, step)
            if step % 2:
                model.mlp[step % 3 // 2 * 2].weight.grad = None
            if step % 5 == 4 and case is not REFERENCE:
                model.mlp[2].weight.grad = torch.full((5, 9), float("nan"))
            optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        alive = gc.get_objects()
        return len(alive), sum(issubclass(type(each), torch.Tensor) for each in alive)

    gc.freeze()
    model = Net()
    optimizer = case(model.named_parameters())
    several(0, 8)
    (objects, tensors), (later, later_tensors) = several(8, 10), several(10, 26)
    assert later_tensors <= tensors
    assert later - objects < 15


# ----------------------------------------------------------------------------------------------- groups and rates


def test_groups_of_equal_settings_are_one(case):
    together, apart = Net().double(), Net().double()
    train(together, case(together.named_parameters()), 6)
    train(apart, case([{"params": [each]} for each in apart.named_parameters()]), 6)
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_each_group_has_its_options(case):
    model, alone = Net(), Net()
    named = list(model.named_parameters())
    optimizer = case([{"params": named[:2], "lr": 0.0}, {"params": named[2:], "lr": 2e-2, "weight_decay": 0.1}])
    before = values(model)
    only = case(list(alone.named_parameters())[2:], lr=2e-2, weight_decay=0.1)
    for step in range(3):
        set_gradients(model, step)
        set_gradients(alone, step)
        optimizer.step()
        only.step()
    assert equal(values(model)[:2], before[:2])
    assert equal(values(model)[2:], values(alone)[2:])


def test_options_may_be_changed_in_their_group(case):
    """As callbacks and schedulers do: the next step is one of an optimizer with these options."""
    model, other = Net(), Net()
    optimizer, changed = case(other.named_parameters()), case(model.named_parameters(), lr=0.5, weight_decay=0.3)
    for key in ("lr", "weight_decay"):
        changed.param_groups[0][key] = optimizer.param_groups[0][key]
    train(model, changed)
    train(other, optimizer)
    assert equal(model, other)
    changed.param_groups[0]["lr"] = 0.0
    before = values(model)
    train(model, changed)
    assert equal(values(model), before)


def test_a_rate_may_be_a_tensor(case):
    for rate in (torch.tensor(1e-2), torch.tensor(1e-2, dtype=torch.float64)):
        model, other = Net(), Net()
        optimizer, plain = case(model.named_parameters(), lr=rate), case(other.named_parameters(), lr=float(rate))
        train(model, optimizer)
        train(other, plain)
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        assert optimizer.param_groups[0]["lr"] is rate and torch.equal(rate, torch.full_like(rate, 1e-2))
        rate.fill_(0.0)
        before = values(model)
        train(model, optimizer)
        assert equal(values(model), before)


class Counted(torch.Tensor):
    """A rate that counts how often it is read: each time, a step waits for the device that it is on."""

    reads = 0

    def __float__(self):
        Counted.reads += 1
        return self.as_subclass(torch.Tensor).item()

    item = __float__


def test_a_rate_that_is_a_tensor_is_read_once_per_step_and_group(case):
    if case is REFERENCE:
        return
    model = Net()
    named, rate = list(model.named_parameters()), torch.tensor(1e-2).as_subclass(Counted)
    optimizer = case([{"params": named[:2]}, {"params": named[2:]}], lr=rate)  # equal groups may step as one

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for given in ([], [closure]):
        set_gradients(model)
        Counted.reads = 0
        optimizer.step(*given)
        assert 1 <= Counted.reads <= 2


@pytest.mark.parametrize("kind", [int, np.float32])
def test_options_may_be_numbers_of_any_kind(case, kind):
    numbers = {"lr": 1, "weight_decay": 0, "eps": 0, "rank": 1, "update_proj_gap": 3, "clip_threshold": 2}
    numbers = {name: number for name, number in numbers.items() if case.takes(name)}
    whole = {"rank", "update_proj_gap"} if issubclass(kind, np.floating) else set()
    given = {name: number if name in whole else kind(number) for name, number in numbers.items()}
    model, other = Net(), Net()
    optimizer = case(model.named_parameters(), **given)
    train(model, optimizer)
    train(other, case(other.named_parameters(), **numbers))
    assert equal(model, other)
    through_a_file(optimizer.state_dict() if case is not REFERENCE else {})


SCHEDULERS = {
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=2),
    "warm-up": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)], milestones=[2]
    ),
    "swa": lambda optimizer: SWALR(optimizer, 0.05, anneal_epochs=3),
}
CYCLES_BETAS = ("one cycle", "cyclic")


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(case, kind):
    """The rates are those of AdamW, and the steps those of the same rates written into the groups."""
    if kind in CYCLES_BETAS and "betas" not in inspect.signature(case.make).parameters:
        pytest.skip("without betas to cycle")
    options = {"betas": (0.9, 0.99)} if kind in CYCLES_BETAS else {}
    model, written, reference = Net(), Net(), Net()
    optimizers = [case(net.named_parameters(), **options) for net in (model, written)]
    optimizers.append(REFERENCE(reference.named_parameters(), **options))
    schedulers = [SCHEDULERS[kind](optimizer) for optimizer in (optimizers[0], optimizers[2])]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch's of an optimizer that did not step
        warnings.filterwarnings("ignore", "update_in_backward=True")
        warnings.filterwarnings("ignore", "The epoch parameter in")
        for step in range(3):
            scheduled, by_hand = (optimizer.param_groups[0] for optimizer in optimizers[:2])
            assert scheduled["lr"] == optimizers[2].param_groups[0]["lr"]
            by_hand["lr"] = scheduled["lr"]
            if kind in CYCLES_BETAS:
                assert scheduled["betas"] == optimizers[2].param_groups[0]["betas"]
                by_hand["betas"] = scheduled["betas"]
            for net, optimizer in zip((model, written, reference), optimizers, strict=True):
                train(net, optimizer, 1, first=step)
            for scheduler in schedulers:
                scheduler.step()
    assert equal(model, written)


def test_plateaus_and_averages(case):
    model, optimizer = trained(case)
    scheduler, average = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0), AveragedModel(model)
    for _ in range(3):
        train(model, optimizer, 1)
        average.update_parameters(model)
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 1e-2 / 4
    assert all(param.isfinite().all() for param in average.parameters())


def test_a_scheduler_keeps_a_rate_that_is_a_tensor(case):
    model, rate = Net(), torch.tensor(1e-2)
    optimizer = case(model.named_parameters(), lr=rate)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    torch.testing.assert_close(rate, torch.tensor(5e-3))


def test_groups_may_be_added(case):
    model = Net()
    optimizer = case(model.mlp.named_parameters(prefix="mlp"))
    train(model, optimizer)
    before = model.norm.weight.detach().clone()
    optimizer.add_param_group({"params": list(model.norm.named_parameters(prefix="norm")), "lr": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 0.5]
    assert set(optimizer.defaults) <= set(optimizer.param_groups[1])
    train(model, optimizer, 1)
    assert not torch.equal(model.norm.weight, before)
    assert float(optimizer.state[model.norm.weight]["step"]) == 1
    assert float(optimizer.state[model.mlp[0].weight]["step"]) == 4


def test_groups_that_cannot_be_added_change_nothing(case):
    model, optimizer = trained(case)
    extra, frozen = nn.Parameter(torch.ones(3, 4)), torch.ones(2, 2, requires_grad=True) * 2
    before, state = copy.deepcopy(optimizer.state_dict()), dict(optimizer.state)
    refused = [
        (TypeError, [("mlp.9.weight", extra)]),
        (TypeError, {"params": [("mlp.9.weight", "a string")]}),
        (ValueError, {"params": [("mlp.9.weight", frozen)]}),
        (ValueError, {"params": [("mlp.0.weight", model.mlp[0].weight)]}),
    ]
    for error, group in refused:
        with pytest.raises(error):
            optimizer.add_param_group(group)
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    assert optimizer.state == state
    twin, other = trained(case)
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


# ------------------------------------------------------------------------------------------------- saving and loading


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(case, model, saved, **options):
    """Another optimizer of a copy of ``model`` that has loaded ``saved``."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    optimizer = case(twin.named_parameters(), **options)
    optimizer.load_state_dict(saved)
    return twin, optimizer


@pytest.mark.parametrize(
    ("steps", "how"),
    [(4, lambda saved: saved), (4, through_a_file), (0, through_a_file)],
    ids=["as it is", "file", "new"],
)
def test_a_resumed_run_is_the_same(case, how, steps):
    model, optimizer = trained(case, steps)
    saved = optimizer.state_dict()
    twin, other = resumed(case, model, copy.deepcopy(saved) if case is REFERENCE else how(saved), lr=0.7)
    assert other.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, 3, first=steps)
    train(twin, other, 3, first=steps)
    assert equal(model, twin)
    assert equal(tensors_in(optimizer.state), tensors_in(other.state))


def test_the_form_of_a_state_dict(case):
    model, optimizer = trained(case)
    saved, again = optimizer.state_dict(), optimizer.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert sorted(saved["state"]) == list(range(len(list(model.parameters()))))
    assert [group["params"] for group in saved["param_groups"]] == [list(range(len(saved["state"])))]
    assert saved["param_groups"] == again["param_groups"]
    assert [list(entry) for entry in saved["state"].values()] == [list(entry) for entry in again["state"].values()]
    assert all("step" in entry for entry in saved["state"].values())
    # as torch's, it has the tensors themselves
    assert all(p is q for p, q in zip(tensors_in(saved), tensors_in(dict(optimizer.state)), strict=True))


def test_loading_copies(case):
    """What is loaded stays as it was, whoever trains on; AdamW shares tensors with it, so that it is left out."""
    if case is REFERENCE:
        return
    model, optimizer = trained(case)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    twin, other = resumed(case, model, saved)
    train(twin, other)
    assert equal(tensors_in(saved), tensors_in(kept)) and saved["param_groups"] == kept["param_groups"]
    others = {tensor.data_ptr() for tensor in tensors_in(other.state) if tensor.numel()}
    assert not others & {tensor.data_ptr() for tensor in tensors_in(optimizer.state) if tensor.numel()}


def test_saves_without_later_options_or_names(case):
    """Of an older version: what is missing keeps this optimizer's value."""
    model, optimizer = trained(case)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in [key for key in group if key not in ("params", "lr", "betas", "eps", "weight_decay")]:
            del group[key]
    twin, other = resumed(case, model, saved)
    assert other.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


def test_steps_may_be_saved_as_numbers(case):
    model, optimizer = trained(case)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = float(entry["step"])
    twin, other = resumed(case, model, saved)
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


def test_a_state_that_does_not_fit_is_refused_before_anything_changes(case):
    model, optimizer = trained(case)
    groups = copy.deepcopy(optimizer.param_groups)
    state = {param: dict(entry) for param, entry in optimizer.state.items()}
    fewer = optimizer.state_dict()
    fewer["param_groups"] = [{**fewer["param_groups"][0], "params": fewer["param_groups"][0]["params"][:-1]}]
    more = optimizer.state_dict()
    more["param_groups"] = [*more["param_groups"], {**more["param_groups"][0], "params": []}]
    for saved in (fewer, more):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(saved)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in groups
    ]
    assert dict(optimizer.state) == state
    twin, other = trained(case)
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


def test_hooks_of_saving(case):
    _, optimizer = trained(case)
    seen = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda each: seen.append(("before", each is optimizer))),
        optimizer.register_state_dict_pre_hook(lambda each: seen.append(("first", each is optimizer)), prepend=True),
        optimizer.register_state_dict_post_hook(lambda _, saved: saved.__setitem__("extra", 1)),
        optimizer.register_state_dict_post_hook(lambda _, saved: {"inside": saved}),
    ]
    saved = optimizer.state_dict()
    assert seen == [("first", True), ("before", True)]
    assert list(saved) == ["inside"] and saved["inside"]["extra"] == 1
    for handle in handles:
        handle.remove()
    assert list(optimizer.state_dict()) == ["state", "param_groups"]


def test_hooks_of_saving_that_leave_something_out(case):
    _, optimizer = trained(case)
    optimizer.register_state_dict_post_hook(lambda _, saved: {"param_groups": saved["param_groups"]})
    assert list(optimizer.state_dict()) == ["param_groups"]


def test_hooks_of_loading(case):
    model, optimizer = trained(case)
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    twin = copy.deepcopy(model)
    other = case(twin.named_parameters())

    def unwrap(each, found):
        seen.append(("before", each is other, len(other.state)))
        return found["inside"]

    def after(each):
        seen.append(("after", each is other, len(other.state)))

    handles = [other.register_load_state_dict_pre_hook(unwrap), other.register_load_state_dict_post_hook(after)]
    other.load_state_dict({"inside": saved})
    assert seen == [("before", True, 0), ("after", True, len(saved["state"]))]
    for handle in handles:
        handle.remove()
    other.load_state_dict(saved)
    assert len(seen) == 2
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


def test_deepcopy(case):
    model, optimizer = trained(case)
    twin, other = copy.deepcopy((model, optimizer))
    assert type(other) is type(optimizer)
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert public <= set(vars(other))
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], twin.parameters(), strict=True))
    before = values(model)
    train(twin, other)
    assert equal(values(model), before)
    train(model, optimizer)
    assert equal(model, twin)


def test_pickle(case):
    model, optimizer = trained(case)
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)
    repr(other)
    other.zero_grad()
    other.state_dict()


def test_subclasses_keep_their_attributes(case):
    class Own(case.make):
        """As a project derives its own."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.notes = {"of": "mine"}

        def step(self, closure=None):
            self.notes["steps"] = self.notes.get("steps", 0) + 1
            return super().step(closure)

    model = Net()
    optimizer = Own(model.named_parameters(), **{"lr": 1e-2, **case.settings})
    train(model, optimizer)
    expected, _ = trained(case)
    assert equal(model, expected)
    assert optimizer.notes == {"of": "mine", "steps": 3}
    if case is not REFERENCE:  # AdamW forgets them
        other = copy.deepcopy(optimizer)
        assert other.notes == optimizer.notes and other.notes is not optimizer.notes


# ------------------------------------------------------------------------------------------------------------- hooks


def test_hooks_of_steps(case):
    model, other, seen = Net(), Net(), []
    optimizer = case(model.named_parameters())
    unwatched = case(other.named_parameters())

    def note(what):
        return lambda each, args, kwargs: seen.append((what, each is optimizer, args, kwargs))

    handles = [
        torch_optimizer.register_optimizer_step_pre_hook(note("every")),
        optimizer.register_step_pre_hook(note("before")),
        optimizer.register_step_post_hook(note("after")),
        torch_optimizer.register_optimizer_step_post_hook(note("every, after")),
    ]
    try:
        set_gradients(model)
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert [what for what, *_ in seen] == ["every", "before", "after", "every, after"]
    assert all(known and not kwargs for _, known, _, kwargs in seen)
    set_gradients(other)
    unwatched.step()
    assert len(seen) == 4 and equal(model, other)


def test_a_hook_may_change_what_a_step_is_called_with(case):
    model = Net()
    optimizer = case(model.named_parameters())

    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    handle = optimizer.register_step_pre_hook(lambda each, args, kwargs: ((each, closure), {}))
    assert optimizer.step() is not None
    handle.remove()
    optimizer.register_step_pre_hook(lambda each, args, kwargs: "nothing of use")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


def test_profiles_name_the_optimizer(case):
    model = Net()
    optimizer = case(model.named_parameters())
    set_gradients(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.events()]
    name = case.make.__name__
    assert names.count(f"Optimizer.step#{name}.step") == 1
    assert names.count(f"Optimizer.zero_grad#{name}.zero_grad") == 1


@pytest.fixture(scope="module")
def compiled():
    """One compiled model, whose weights each test sets anew."""
    model = Net()
    return model, torch.compile(model, backend="eager")


def test_a_compiled_model(case, compiled):
    model, wrapped = compiled
    model.load_state_dict(Net().state_dict())
    optimizer = case(wrapped.named_parameters())
    train(wrapped, optimizer)
    expected, _ = trained(case)
    assert equal(model, expected)
    model.zero_grad()


def test_every_exported_optimizer_is_here():
    assert {case.make.__name__ for case in CASES.values()} >= {"AdaPM", "AdamMini", "AdaLomo", "Lomo", "LoRAPre"}
