"""Steps that are counted together are those of every state, whoever else is counted beside it."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_gpt, token_batches, train

from lightning_adapm import AdaPM
from lightning_adapm.step.counters import count_step


@given(st.lists(st.sets(st.integers(0, 4), min_size=1), max_size=12))
def test_every_state_has_its_own_number(steps):
    known, expected = {}, [0] * 5
    states = [{"step": torch.tensor(0.0)} for _ in expected]
    for counted in steps:
        for index in counted:
            expected[index] += 1
        numbers, known[min(counted)] = count_step([states[index] for index in counted], known.get(min(counted)))
        assert numbers == [expected[index] for index in counted]
        assert [int(state["step"]) for state in states] == expected
        assert all(state["step"].dim() == 0 and state["step"].dtype == torch.float32 for state in states)


def test_numbers_that_were_put_in_are_counted_from():
    states = [{"step": torch.tensor(float(number))} for number in (3, 7)]
    numbers, first = count_step(states)
    assert numbers == [4, 8]
    states[0]["step"] = torch.tensor(10.0)
    numbers, second = count_step(states, first)
    assert numbers == [11, 9] and second is not first
    states[1]["step"].fill_(20)  # as torch.distributed.checkpoint loads
    numbers, third = count_step(states, second)
    assert numbers == [12, 21] and third is second


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
