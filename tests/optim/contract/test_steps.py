"""The contract of ``torch.optim.Optimizer``: what a step does.

Nothing here is about what an optimizer computes. ``torch.optim.AdamW`` passes too, as the reference.
"""

import gc
import inspect

import pytest
import torch
from contract import Net, equal, loss_of, set_gradients, tensors_in, train, trained, values
from optimizers import REFERENCE
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:update_in_backward=True frees no gradient early"),
    pytest.mark.filterwarnings("ignore:.* found no gradient on any of its parameters"),
]


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


def test_a_default_device_moves_no_state(case):
    """As ``torch.set_default_device("cuda")`` in a notebook: a step would wait for counters on the GPU."""
    if case is REFERENCE:
        pytest.skip("torch's counters follow the default device")
    model, elsewhere = Net(), Net()
    for each, default in ((model, "cpu"), (elsewhere, "meta")):
        optimizer = case(each.named_parameters())
        for step in range(3):
            set_gradients(each, step)
            with torch.device(default):
                optimizer.step()
    assert equal(model, elsewhere)
    assert {tensor.device.type for tensor in tensors_in(optimizer.state_dict())} == {"cpu"}
