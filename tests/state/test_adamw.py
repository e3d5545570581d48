"""torch's AdamW goes on from the states of this package's optimizers, as they go on from its states."""

import copy

import pytest
import torch
from models import PlainLM, tiny_gpt, token_batches, train
from saved import trained

from lightning_adapm import AdaPM, PartialMuon, adamw_state_dict


def loaded(model, saved, **options):
    adamw = torch.optim.AdamW(model.parameters(), **options)
    adamw.register_load_state_dict_pre_hook(adamw_state_dict)
    adamw.load_state_dict(saved)
    return adamw


@pytest.mark.parametrize("make", [PlainLM, tiny_gpt], ids=["separate", "fused"])
def test_full_momentum_trains_as_it_would_have(make):
    model = make().double()
    optimizer = AdaPM(model.parameters(), momentum="full", lr=3e-3, weight_decay=0.1)
    train(model, optimizer, token_batches(3))
    other = copy.deepcopy(model)
    adamw = loaded(other, optimizer.state_dict(), lr=1.0)
    for each, its in ((model, optimizer), (other, adamw)):
        train(each, its, token_batches(3, seed=1))
    assert adamw.param_groups[0]["lr"] == 3e-3
    torch.testing.assert_close(dict(other.named_parameters()), dict(model.named_parameters()), rtol=1e-9, atol=1e-9)


def test_factors_codes_and_means_become_tensors_of_the_parameters_shapes():
    model, optimizer = trained(second_moment="factored", state_dtype={"full": "int8"})
    full = AdaPM(model.parameters(), momentum="full")
    with pytest.warns(UserWarning, match="second_moment=elementwise"):
        full.load_state_dict(optimizer.state_dict())
    adamw = loaded(model, optimizer.state_dict())
    for param in model.parameters():
        state, wanted = adamw.state[param], full.state[param]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == param.shape
        assert state["step"] == 6
        for key in {"exp_avg", "exp_avg_sq"} & wanted.keys():  # those of a fused weight have prefixes
            assert torch.equal(state[key], wanted[key]), full.names[param]


def test_its_own_states_are_loaded_as_they_are():
    model = tiny_gpt()
    adamw = torch.optim.AdamW(model.parameters())
    train(model, adamw, token_batches(1))
    state = adamw.state_dict()
    assert adamw_state_dict(adamw, state) is state


def test_orthogonal_updates_have_no_second_moment_to_go_on_with():
    model = tiny_gpt()
    muon = PartialMuon(model.parameters())
    train(model, muon, token_batches(1))
    with pytest.raises(ValueError, match="h.0.attn.qkv.weight has no second moment"):
        loaded(model, muon.state_dict())


def test_other_groups_are_refused():
    model, optimizer = trained()
    first, *rest = model.parameters()
    adamw = torch.optim.AdamW([{"params": [first]}, {"params": rest}])
    with pytest.raises(ValueError, match=r"groups of \[17\] parameters, this one of \[1\]"):
        adamw.load_state_dict(adamw_state_dict(adamw, optimizer.state_dict()))
