"""Memory that callers let go is given back: no cache keeps state or parameters."""

import gc
import weakref

import pytest
import torch
from models import PlainLM, token_batches, train
from optimizers import CASES, REFERENCE

OPTIMIZERS = pytest.mark.parametrize("case", [REFERENCE, *CASES.values()], ids=["AdamW", *CASES])


def net():
    torch.manual_seed(0)
    return PlainLM(vocab=61, width=8, layers=1, n_head=2, n_query_groups=1)


def alive(references):
    gc.collect()
    return [reference() for reference in references if reference() is not None]


@OPTIMIZERS
def test_state_that_is_cleared(case):
    model = net()
    optimizer = case(model.parameters())
    train(model, optimizer, token_batches(3))
    held = [
        weakref.ref(value)
        for state in optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value) and value.dim()
    ]
    optimizer.state.clear()
    assert not alive(held)
    twin = net()
    twin.load_state_dict(model.state_dict())
    other = case(twin.parameters())
    assert train(model, optimizer, token_batches(3)) == train(twin, other, token_batches(3))


@OPTIMIZERS
def test_groups_that_are_removed(case):
    model = net()
    named = dict(model.named_parameters())
    first = {name: named.pop(name) for name in list(named) if "layers" in name}
    heads = {"n_head": 2, "n_query_groups": 1}
    optimizer = case([{"params": list(each.items()), **heads} for each in (named, first)])
    train(model, optimizer, token_batches(2))
    next(iter(first.values())).grad.fill_(torch.nan)  # counted by parameter
    optimizer.step()
    held = [weakref.ref(param) for param in first.values()]
    for param in optimizer.param_groups.pop()["params"]:
        del optimizer.state[param]
    del param, first, model.layers[0]
    train(model, optimizer, token_batches(2))
    assert not alive(held)
    optimizer.load_state_dict(optimizer.state_dict())
