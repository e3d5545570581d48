"""The contract of ``torch.optim.Optimizer``: parameter groups, learning rates and schedulers.

Nothing here is about what an optimizer computes. ``torch.optim.AdamW`` passes too, as the reference.
"""

import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from contract import Net, equal, loss_of, set_gradients, through_a_file, train, trained, values
from optimizers import REFERENCE
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:update_in_backward=True frees no gradient early"),
    pytest.mark.filterwarnings("ignore:.* found no gradient on any of its parameters"),
]


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
