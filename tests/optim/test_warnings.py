"""Warnings are of the caller's line, for each of which Python shows the same words once."""

import inspect
import math
import warnings

import pytest
import torch
from models import PlainLM, token_batches, train
from torch import nn

from lightning_adapm import AdaPM


def no_gradient():
    AdaPM(PlainLM().parameters()).step()


def ignored_keyword():
    AdaPM(PlainLM().parameters(), foreach=True)


def duplicates():
    weight = nn.Parameter(torch.ones(3, 4))
    AdaPM([("mlp.weight", weight), ("mlp.weight", weight)])


def matrices_without_a_role():
    AdaPM([("gadget", nn.Parameter(torch.ones(3, 4)))], unmatched="full")


def names_that_no_parameter_has():
    AdaPM(PlainLM().parameters(), roles={"mpl": "mlp"})


def rows_of_heads():
    attention = nn.ModuleDict({"query_key_value": nn.Linear(8, 24)})
    attention.num_heads = 2
    AdaPM(nn.ModuleDict({"self_attention": attention}).parameters())


def added_group():
    optimizer = AdaPM(PlainLM().parameters(), unmatched="full")
    optimizer.add_param_group({"params": [("gadget", nn.Parameter(torch.ones(3, 4)))]})


def early_updates_without_a_closure():
    AdaPM(PlainLM().parameters(), update_in_backward=True).step()


def accumulated():
    model, (tokens,) = PlainLM(), token_batches(1)
    optimizer = AdaPM(model.parameters(), update_in_backward=True)
    model(tokens).backward()
    optimizer.step(lambda: model(tokens).backward())


def parameter_that_nobody_trains():
    model, (tokens,) = PlainLM(), token_batches(1)
    optimizer = AdaPM(model.parameters())
    train(model, optimizer, [tokens])
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 61))
    model(tokens).backward()
    optimizer.step()


def broken_gradients():
    weight = nn.Parameter(torch.ones(3, 4))
    optimizer = AdaPM([("mlp.weight", weight)])
    for _ in range(20):
        weight.grad = torch.full((3, 4), math.nan)
        optimizer.step()


def other_settings():
    model = PlainLM()
    optimizer = AdaPM(model.parameters())
    train(model, optimizer, token_batches(1))
    AdaPM(model.parameters(), lr=1.0).load_state_dict(optimizer.state_dict())


CASES = [value for value in list(globals().values()) if inspect.isfunction(value) and value.__module__ == __name__]


@pytest.mark.parametrize("warn", CASES, ids=lambda warn: warn.__name__)
def test_a_warning_is_of_the_callers_line(warn):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn()
    assert caught
    first, last = warn.__code__.co_firstlineno, warn.__code__.co_firstlineno + len(inspect.getsourcelines(warn)[0])
    for warning in caught:
        assert warning.filename == __file__ and first < warning.lineno < last, str(warning.message)
