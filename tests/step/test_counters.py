"""Steps that are counted together are those of every state, whoever else is counted beside it."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_gpt, token_batches, train

from lightning_adapm import AdaPM
from lightning_adapm.step.counters import StepCounters


@given(st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=12))
def test_every_state_has_its_own_number(steps):
    counters, expected = StepCounters(), [0] * 5
    states = [{"step": torch.tensor(0.0)} for _ in expected]
    for counted in steps:
        for index in counted:
            expected[index] += 1
        assert counters.count([states[index] for index in counted])[0] == [expected[index] for index in counted]
        assert [int(state["step"]) for state in states] == expected
        assert all(state["step"].dim() == 0 and state["step"].dtype == torch.float32 for state in states)


def test_numbers_that_were_put_in_are_counted_from():
    counters, states = StepCounters(), [{"step": torch.tensor(float(number))} for number in (3, 7)]
    assert counters.count(states) == ([4, 8], False)
    states[0]["step"] = torch.tensor(10.0)
    assert counters.count(states) == ([11, 9], False)
    states[1]["step"].fill_(20)  # as torch.distributed.checkpoint loads
    assert counters.count(states) == ([12, 21], True)


def test_a_frozen_parameter_keeps_its_count(tmp_path):
    model = tiny_gpt()
    optimizer = AdaPM(model.named_parameters(), lr=1e-3, rank=2)
    train(model, optimizer, token_batches(2))
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    frozen.grad = None
    train(model, optimizer, token_batches(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    train(model, optimizer, token_batches(1))
    counts = {int(state["step"]) for param, state in optimizer.state.items() if param is not frozen}
    assert counts == {6} and int(optimizer.state[frozen]["step"]) == 2
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert {int(state["step"]) for state in optimizer.state.values()} == {2, 5}


def test_scalars_that_were_loaded_to_another_device_come_back():
    """As ZeroRedundancyOptimizer loads them: to the CPU, into a state dict of its own."""
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    optimizer = AdaPM([("norm.weight", param)], second_moment="block")
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert {key: value.device.type for key, value in optimizer.state[param].items()} == {
            "step": "cpu",
            "exp_avg": "meta",
            "exp_avg_sq": "meta",
        }
        optimizer.state[param] = {
            key: value if value.dim() else torch.tensor(1.0) for key, value in optimizer.state[param].items()
        }
