"""Parameter groups: their options, lists that change in place, and that a group is refused as a whole."""

import copy
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from models import PlainLM, token_batches, train
from torch import nn
from towers import Tower, TwoTowers, by_parameter, steps

from lightning_adapm import AdaLomo, AdaPM, explain


@pytest.mark.parametrize(
    "group",
    [
        lambda m: {"params": [m.narrow.blocks[0].norm.weight, m.logit_scale]},
        lambda m: {"params": [("taken.role.weight", m.wide.blocks[0].mlp[0].weight)]},
        lambda m: {"params": [*m.narrow.parameters(), nn.Parameter(torch.zeros(3, 3))]},
        lambda m: {"params": m.narrow.parameters(), "rank": -1},
        lambda m: {"params": m.narrow.parameters(), "amsgrad": True},
        lambda m: {"params": set(m.narrow.parameters())},
    ],
)
def test_a_refused_group_changes_nothing(group):
    model = TwoTowers()
    optimizer = AdaPM([*model.wide.parameters(), model.logit_scale])
    kept = [copy.copy(getattr(optimizer, name)) for name in ("names", "roles", "pieces", "reasons", "param_groups")]
    lists = copy.copy(optimizer.param_groups[0])
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group(group(model))
    assert kept == [getattr(optimizer, name) for name in ("names", "roles", "pieces", "reasons", "param_groups")]
    assert optimizer.param_groups[0] == lists


def test_groups_without_parameters_work_as_in_adamw():
    model = TwoTowers()
    for make in (torch.optim.AdamW, AdaPM):
        optimizer = make([{"params": []}, {"params": iter(())}])
        optimizer.add_param_group({"params": model.parameters()})
        optimizer.add_param_group({"params": []})
        steps(model, optimizer, 1)
        assert [len(group["params"]) for group in optimizer.param_groups] == [0, 0, len(list(model.parameters())), 0]
        make([{"params": []}]).load_state_dict(make([{"params": []}]).state_dict())
        optimizer.load_state_dict(optimizer.state_dict())


def test_lists_that_change_in_place():
    torch.manual_seed(0)
    model = TwoTowers()
    optimizer = AdaPM([{"params": model.wide.parameters()}, {"params": model.narrow.parameters()}], betas=[0.9, 0.99])
    first, second = optimizer.param_groups
    assert first["no_decay"] is not second["no_decay"]
    steps(model, optimizer, 1)
    moved, gone = first["params"].pop(3), second["params"].pop(0)
    second["params"] += [moved, moved]
    first["betas"][0] = 0.0
    before = gone.detach().clone()
    steps(model, optimizer, 1)
    assert torch.equal(gone, before)
    assert optimizer.state[moved]["step"] == 2
    assert sum(param is moved for param in second["params"]) == 1
    assert second["param_names"][-1] == optimizer.names[moved] == "wide.blocks.0.attn.qkv.bias"
    assert second["betas"] == [0.9, 0.99]
    weight = model.wide.blocks[0].norm.weight
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], weight.grad)
    assert len(explain(optimizer)) > 0
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[1]["roles"] == second["roles"]


def test_a_parameter_handed_over_twice_is_trained_once():
    model = Tower()
    with pytest.warns(UserWarning, match="duplicate parameters, 20 of them"):
        optimizer = AdaPM([*model.parameters(), *model.parameters()])
    assert len(optimizer.param_groups[0]["params"]) == len(optimizer.param_groups[0]["param_names"]) == 20
    steps(model, optimizer, 1, width=32)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_a_user_s_own_entries_may_be_anything():
    model = TwoTowers()
    extra = {"mask": torch.ones(3), "table": np.arange(4), "name": ["a"], "lr_scale": 0.5}
    optimizer = AdaPM([{"params": model.wide.parameters(), **extra}, {"params": model.narrow.parameters(), **extra}])
    steps(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 1)
    assert optimizer.param_groups[1]["mask"].sum() == 3


def test_a_caller_s_group_is_the_optimizer_s():
    model = TwoTowers()
    group = {"params": model.parameters(), "lr": 1e-2}
    optimizer = AdaPM([group])
    group["lr"] = 0.0
    before = [param.detach().clone() for param in model.parameters()]
    assert all(map(torch.equal, steps(model, optimizer, 1), before))


def test_options_of_a_group():
    model = TwoTowers()
    groups = [
        {"params": model.wide.parameters(), "momentum": {"mlp": "none"}, "no_decay": "norm"},
        {"params": model.narrow.parameters(), "momentum": "full", "state_dtype": torch.bfloat16},
    ]
    optimizer = AdaPM(groups, momentum={"query": "none"})
    first, second = (group["momentum"] for group in optimizer.param_groups)
    assert (first["mlp"], first["query"], first["key"]) == ("none", "none", "full")
    assert set(second.values()) == {"full"}
    assert optimizer.param_groups[0]["no_decay"] == ["norm"]
    assert optimizer.param_groups[1]["state_dtype"] == "bfloat16"


def test_left_over_keywords():
    model = TwoTowers()
    with pytest.warns(UserWarning, match=r"AdaPM ignores foreach=True, fused=True: ") as caught:
        AdaPM(model.parameters(), amsgrad=False, foreach=True, fused=True, decoupled_weight_decay=True)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaPM(model.parameters(), amsgrad=False, foreach=None, fused=False)
    with pytest.raises(ValueError, match="AdaLomo has no counterpart of amsgrad=True"):
        AdaLomo(model.parameters(), amsgrad=True)
    with pytest.raises(TypeError, match="AdaPM has no option 'ranks'; did you mean 'rank'"):
        AdaPM(model.parameters(), ranks=3)


def test_a_printed_optimizer_counts_parameters_by_role():
    optimizer = AdaPM([{"params": PlainLM(layers=2).named_parameters(), "lr": 0.5}])
    assert "    lr: 0.5\n" in repr(optimizer)
    assert re.search(r"^    roles: 1 embedding, .*2 query, 2 key", repr(optimizer), re.MULTILINE)
    assert "q_proj" not in repr(optimizer)


def test_an_optimizer_is_rebuilt_from_its_groups_and_defaults():
    model = TwoTowers()
    optimizer = AdaPM(model.parameters(), rank=2, roles={"mlp": "none"}, betas=(0.8, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = type(optimizer)(optimizer.param_groups, **optimizer.defaults)
    assert by_parameter(again) == by_parameter(optimizer)
    assert again.defaults == optimizer.defaults
    again.load_state_dict(optimizer.state_dict())
    unnamed = AdaPM([{"params": [nn.Parameter(torch.ones(4, 4))], "role": "mlp"}])
    assert by_parameter(AdaPM(unnamed.param_groups)) == by_parameter(unnamed)


def test_rates_by_layer_step_together(monkeypatch):
    model = PlainLM()
    optimizer = AdaPM([{"params": [param]} for param in model.parameters()])
    moved = []
    move = AdaPM.move
    monkeypatch.setattr(AdaPM, "move", lambda self, batch, group: moved.append(batch) or move(self, batch, group))
    train(model, optimizer, token_batches(1))
    apart = len(moved)
    moved.clear()
    whole = AdaPM(model.parameters())
    train(model, whole, token_batches(1))
    assert apart == len(moved)
