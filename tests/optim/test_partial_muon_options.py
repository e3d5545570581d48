"""Options of PartialMuon, and which matrices they are about."""

import warnings

import pytest
import torch
from hidden_matrices import hidden, one_weight, steps
from models import PlainLM
from torch import nn

from lightning_adapm import PartialMuon, explain


def test_a_matrix_with_a_policy_or_without_a_role_takes_adams_update():
    weight = nn.Parameter(torch.randn(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for options in ({"roles": {"mystery": "full"}}, {"unmatched": "full"}):
            optimizer = PartialMuon([("mystery", weight)], lr=1e-2, **options)
            weight.grad = torch.randn_like(weight)
            optimizer.step()
            assert optimizer.state[weight]["exp_avg_sq"].shape == (8, 1)


def test_heads_need_not_be_known():
    weight = nn.Parameter(torch.randn(8, 6))
    PartialMuon([("attn.q_proj.weight", weight)], lr=1e-2)


def test_the_table_says_who_gets_what():
    explanation = explain(PartialMuon(PlainLM().parameters(), rank=2))
    rows = {row.name: row for row in explanation}
    assert {name for name, row in rows.items() if row.orthogonal} == {
        name for name, param in PlainLM().named_parameters() if hidden(name, param)
    }
    lines = {line.split()[0]: line.split() for line in str(explanation).splitlines() if line.strip()}
    assert "Update" in lines["Parameter"] and "orthogonal" in lines["layers.0.mlp.0.weight"]
    assert "Adam's" in lines["embed_tokens.weight"] and "Update" not in str(explain(PlainLM()))
    assert rows["layers.0.mlp.0.weight"].bytes.second_moment == 0
    assert rows["embed_tokens.weight"].bytes.second_moment == 61 * 4


@pytest.mark.parametrize(
    "option", [{"mu": 1.0}, {"mu": -0.1}, {"ns_steps": 0}, {"ns_steps": 2.5}, {"newton_schulz": "four"}]
)
def test_options_out_of_range(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be"):
        PartialMuon(PlainLM().parameters(), **option)


def test_so_many_fast_steps_do_not_exist():
    with pytest.raises(ValueError, match="ns_steps must be 2, 3 or 4 with newton_schulz='fast', but got 5"):
        PartialMuon(PlainLM().parameters(), newton_schulz="fast", ns_steps=5)


@pytest.mark.parametrize(
    ("options", "group", "expected"),
    [
        ({}, {}, ("fast", 2)),
        ({"momentum": "paper"}, {}, ("fast", 2)),
        ({"momentum": "full"}, {}, ("muon", 5)),
        ({"ns_steps": 3}, {}, ("muon", 3)),
        ({"newton_schulz": "muon"}, {}, ("muon", 5)),
        ({"newton_schulz": "fast", "momentum": "full"}, {}, ("fast", 2)),
        ({"newton_schulz": "fast", "ns_steps": 3}, {}, ("fast", 3)),
        ({}, {"momentum": "full"}, ("muon", 5)),
        ({"momentum": "full"}, {"momentum": {"mlp": "low_rank"}}, ("fast", 2)),
        ({}, {"ns_steps": 2}, ("muon", 2)),
        ({}, {"newton_schulz": "muon"}, ("muon", 5)),
        ({"newton_schulz": "fast"}, {"newton_schulz": "auto", "momentum": "full"}, ("muon", 5)),
    ],
)
def test_each_kind_of_newton_schulz_has_its_steps(options, group, expected):
    """Automatic, it is Muon's for Muon and for a given number of steps, else fast; each group has its own."""
    (group,) = PartialMuon([{"params": PlainLM().named_parameters(), **group}], **options).param_groups
    assert (group["newton_schulz"], group["ns_steps"]) == expected


def test_saved_steps_of_newton_schulz_keep_their_kind():
    """Those of an earlier version, which had no other, and of torch's Muon; what is set afterwards is checked."""
    weight, optimizer = one_weight()
    for _ in steps(weight, optimizer, 1):
        pass
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["newton_schulz"], group["as_built"]["newton_schulz"]
    other, fast = one_weight(newton_schulz="fast", ns_steps=3)
    with pytest.warns(UserWarning, match=r"ns_steps=5 .*, newton_schulz=muon \(the code has fast\)"):
        fast.load_state_dict(saved)
    for _ in steps(other, fast, 1):
        pass
    fast.param_groups[0]["newton_schulz"] = "fast"
    with pytest.raises(ValueError, match="ns_steps must be 2, 3 or 4"):
        fast.step()
    fast.param_groups[0]["ns_steps"] = 4
    fast.step()
