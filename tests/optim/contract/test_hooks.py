"""The contract of ``torch.optim.Optimizer``: hooks, profiles and compiled models.

Nothing here is about what an optimizer computes. ``torch.optim.AdamW`` passes too, as the reference.
"""

import pytest
import torch
from contract import Net, equal, loss_of, set_gradients, train, trained
from optimizers import CASES
from torch.optim import optimizer as torch_optimizer

from lightning_adapm import AdaPM

pytestmark = [
    pytest.mark.filterwarnings("ignore:update_in_backward=True frees no gradient early"),
    pytest.mark.filterwarnings("ignore:.* found no gradient on any of its parameters"),
]


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


def test_a_compiled_step():
    """Also as part of a compiled training step: the optimizer's is launched as it is."""
    weights = []
    for compiled in (lambda function: function, torch.compile(backend="eager")):
        model = Net()
        optimizer = AdaPM(model.named_parameters(), lr=1e-2)

        def train_once(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()

        once, step = compiled(train_once), compiled(optimizer.step)
        for _ in range(3):
            once()
            step()
        weights.append(model)
    assert equal(*weights)


def test_every_exported_optimizer_is_here():
    assert {case.make.__name__ for case in CASES.values()} >= {"AdaPM", "AdamMini", "AdaLomo", "Lomo", "LoRAPre"}
