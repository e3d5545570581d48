"""Tensors without values, with which memory is planned and estimated: the meta device and FakeTensorMode."""

import pytest
import torch
from models import PlainLM, token_batches, train
from optimizers import CASES, REFERENCE
from torch._subclasses.fake_tensor import FakeTensorMode

OPTIMIZERS = pytest.mark.parametrize("case", [REFERENCE, *CASES.values()], ids=["AdamW", *CASES])


def net():
    return PlainLM(vocab=11, width=8, layers=1, n_head=2, n_query_groups=1)


def shapes(optimizer):
    return [
        {key: (value.shape, value.dtype) for key, value in state.items() if isinstance(value, torch.Tensor)}
        for state in optimizer.state.values()
    ]


def stepped(case, model, steps=4):
    optimizer = case(model.parameters())
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.empty_like(param)
        optimizer.step()
    return optimizer


@OPTIMIZERS
def test_on_the_meta_device(case):
    with torch.device("meta"):
        model = net()
    optimizer = stepped(case, model)
    assert shapes(optimizer) == shapes(stepped(case, net(), steps=1))
    other = case(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    other.step()
    assert shapes(other) == shapes(optimizer)
    assert all(param.is_meta for param in model.parameters())


@OPTIMIZERS
def test_under_fake_tensor_mode(case):
    with FakeTensorMode():
        model = net()
        optimizer = stepped(case, model)
        other = case(model.parameters())
        other.load_state_dict(optimizer.state_dict())
        other.step()
    assert shapes(other) == shapes(optimizer) == shapes(stepped(case, net(), steps=1))


def test_nothing_fake_stays_behind():
    """A step after one under FakeTensorMode, of the same shapes, is as without it."""
    batches = token_batches(4, vocab=11)

    def losses():
        torch.manual_seed(0)
        model = net()
        return train(model, CASES["AdaPM elementwise"](model.parameters()), batches)

    expected = losses()
    with FakeTensorMode():
        stepped(CASES["AdaPM elementwise"], net())
    assert losses() == expected
    with FakeTensorMode():
        stepped(CASES["AdaPM elementwise"], net())
