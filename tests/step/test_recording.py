"""Recorded steps: kernels are interpreted on a CPU, and a list of operations is in the place of a CUDA graph."""

import copy
import os
import sys
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_adapm import AdaLomo, AdaPM, Lomo, LoRAPre, PartialMuon
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.step import graphs, kernels, launch, norms

pytest.importorskip("triton", reason="the kernels are Triton's")


class Calls(TorchDispatchMode):
    """A graph of operations: none changes memory that was there before until they are replayed."""

    def __init__(self, start: Callable[..., None]) -> None:
        super().__init__()
        self.calls = []
        self.replays = 0
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(launch, "start", lambda *args: self.calls.append((start, args, {}, None)))
        self.__enter__()

    def end(self):
        self.__exit__(None, None, None)
        self.patch.undo()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments):
            self.calls.append((func, args, kwargs, None))
            return kwargs.get("out", args[0] if func._schema.returns else None)
        result = func(*args, **kwargs)
        known = {leaf.data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if not all(isinstance(leaf, torch.Tensor) and leaf.data_ptr() in known for leaf in tree_leaves(result)):
            self.calls.append((func, args, kwargs, result))
        return result

    def replay(self):
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(found), strict=False):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """The graphs that steps are recorded as."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a CUDA device tests/gpu/test_recording.py records CUDA graphs")
    made, start = [], launch.start
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(kernels, "FACTOR", torch.float32)  # the interpreter cannot multiply bfloat16
    monkeypatch.setattr(graphs, "can_capture", lambda device: True)
    monkeypatch.setattr(graphs, "new_pool", lambda: "pool")
    monkeypatch.setattr(graphs, "reserved", lambda device: 0)
    monkeypatch.setattr(graphs, "memory", lambda device: 0)

    def begun():
        made.append(Calls(start))
        return made[-1]

    def captured(work, device, pool):
        sections = graphs.Sections()
        sections.capture(work, begun)
        return sections

    monkeypatch.setattr(graphs, "captured", captured)
    return made


def model(dtype=torch.float32, depth=2):
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"mlp": nn.Linear(24, 20), "q_proj": nn.Linear(24, 16)}) for _ in range(depth)]
    return nn.ModuleDict({"embed": nn.Embedding(9, 24), "layers": nn.ModuleList(layers)}).to(dtype)


def gradient(param, generator, spoiled):
    grad = torch.randn(param.shape, generator=generator).to(param.dtype)
    if spoiled:
        grad.view(-1)[3] = float("nan")
    return grad


class Twins:
    """A model that is trained with recorded steps, and one without; every step must leave the same bits."""

    def __init__(self, dtype=torch.float32, make=AdaPM, **options):
        self.nets = [model(dtype), model(dtype)]
        options = {"lr": 1e-2, "roles": {"q_proj": "query"}, "update_in_backward": False} | options
        if make in (AdaPM, PartialMuon):
            options = {"rank": 2, "state_dtype": None, "update_proj_gap": 4} | options
        if make is AdaPM:
            options = {"momentum": "compact"} | options
        groups = [{"params": net.named_parameters(), "n_head": 2} for net in self.nets]
        self.optimizers = [make([group], **options) for group in groups]
        self.optimizers[0].most_recorded_bytes, self.optimizers[1].most_recorded_bytes = 1 << 20, 0
        self.steps = 0

    def step(self, missing=(), spoiled=(), in_place=False):
        self.steps += 1
        for net, optimizer in zip(self.nets, self.optimizers, strict=True):
            if optimizer.update_in_backward:
                optimizer.step(partial(self._backward, net, optimizer, missing, spoiled))
                continue
            generator = torch.Generator().manual_seed(self.steps)
            held = []
            for name, param in net.named_parameters():
                grad = gradient(param, generator, name in spoiled)
                if in_place and param.grad is not None:
                    param.grad.copy_(grad)
                else:
                    held.append(param.grad)  # so that new gradients lie elsewhere
                    param.grad = None if name in missing else grad
            optimizer.step()
        self._compare()

    def gradients(self):
        """The gradients of this step, if all of them are finite."""
        generator = torch.Generator().manual_seed(self.steps)
        return [gradient(param, generator, False) for param in self.nets[0].parameters()]

    def _backward(self, net, optimizer, missing, spoiled):
        """Gradients as in a step, one after another."""
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(self.steps)
        named = [(name, param, gradient(param, generator, name in spoiled)) for name, param in net.named_parameters()]
        sum((param * grad).sum() for name, param, grad in named if name not in missing).backward()

    def _compare(self):
        for (name, one), other in zip(self.nets[0].named_parameters(), self.nets[1].parameters(), strict=True):
            assert torch.equal(one, other), (self.steps, name)
            states = [optimizer.state[param] for optimizer, param in zip(self.optimizers, (one, other), strict=True)]
            for key, value in states[1].items():
                assert torch.equal(torch.as_tensor(states[0][key]), torch.as_tensor(value)), (self.steps, name, key)


@pytest.mark.parametrize(
    "options",
    [
        {"second_moment": "elementwise"},
        {"second_moment": "block", "dtype": torch.bfloat16},
        {"second_moment": "factored"},
        {"make": PartialMuon},
    ],
)
def test_replays_are_the_steps_that_launches_would_take(recorded, options):
    """With another learning rate in every step, gradients anywhere, one that is not finite, and refreshes."""
    twins = Twins(**options)
    for step in range(13):
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        twins.step(in_place=step % 3 == 0, spoiled={"embed.weight"} if step == 7 else ())
    assert [graph.replays for graph in recorded] == [5, 2, 2]  # ordinary steps, and refreshes of either phase
    assert [optimizer.nonfinite_gradients() for optimizer in twins.optimizers] == [{"embed.weight": 1}] * 2


@pytest.mark.parametrize(
    ("make", "dtype"), [(AdaLomo, torch.float32), (Lomo, torch.bfloat16), (LoRAPre, torch.float32)]
)
def test_all_of_a_neighbor_s_step_is_replayed(recorded, make, dtype):
    """Vectors as well, with another rate and decay in every step."""
    twins = Twins(dtype, make, weight_decay=0.1)
    for step in range(5):
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        twins.step(spoiled={"layers.0.mlp.weight", "layers.1.q_proj.bias"} if step == 3 else ())
    assert [graph.replays for graph in recorded] == [4]
    assert {(row.path, row.launches) for row in twins.optimizers[0].step_paths()} == {("kernels", "replayed")}
    found = [optimizer.nonfinite_gradients() for optimizer in twins.optimizers]
    assert found == [{"layers.0.mlp.weight": 1, "layers.1.q_proj.bias": 1}] * 2


def test_parameters_that_move_together_inside_backward_are_replayed(recorded, monkeypatch):
    """Every group of them by itself; where they come in other groups, they are launched until that stays so.

    The norm is of what kernels have read, whether they are launched or replayed: nothing is read once more for it.
    """
    twins = Twins(second_moment="factored", update_in_backward=True, update_proj_gap=3)
    read_again = []
    monkeypatch.setattr(norms, "norms_of", lambda grads: read_again.extend(grads) or [])
    for step in range(9):
        for optimizer in twins.optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
        twins.step(spoiled={"embed.weight"} if step == 6 else ())
        true = nn.utils.get_total_norm(twins.gradients())
        for optimizer in twins.optimizers:
            assert step == 6 or torch.allclose(optimizer.gradient_norm, true), step
    assert not read_again
    groups = len(twins.optimizers[0]._engine._recorders)
    assert groups > 1 and sum(graph.replays for graph in recorded) == 6 * groups
    assert {row.launches for row in twins.optimizers[0].step_paths()} == {"replayed"}
    before = sum(graph.replays for graph in recorded)
    twins.step(missing={"layers.1.q_proj.weight"})
    assert sum(graph.replays for graph in recorded) - before < groups
    twins.step()
    assert twins.optimizers[0].nonfinite_gradients() == twins.optimizers[1].nonfinite_gradients() == {"embed.weight": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"second_moment": "elementwise"},
        {"second_moment": "block"},
        {"second_moment": "factored"},
        {"make": PartialMuon, "basis": "replicate"},
    ],
)
def test_collectives_run_between_graphs(recorded, hold_all_rows, options):
    """Where processes share rows: as many in a replay as in the step that it repeats, and with the numbers of today."""
    exchanged = hold_all_rows()
    twins = Twins(**options)
    ordinary = []
    for step in range(13):
        exchanged.clear()
        twins.step(spoiled={"layers.0.mlp.weight", "layers.1.q_proj.bias"} if step in (7, 8) else ())
        half = len(exchanged) // 2
        assert exchanged[:half] == exchanged[half:]
        ordinary += [] if twins.steps in (1, 5, 9, 13, 3, 7, 11) else [half]
    assert len(set(ordinary)) == 1 and (ordinary[0] == 1 or "make" in options)
    assert len(recorded) > 3 and recorded[0].replays > 3
    assert [optimizer.nonfinite_gradients() for optimizer in twins.optimizers] == [
        {"layers.0.mlp.weight": 2, "layers.1.q_proj.bias": 2}
    ] * 2


def test_a_step_that_is_unlike_those_recorded_is_launched(recorded):
    """A gradient is missing once, a monitor looks on, options change, memory moves, a state is loaded."""
    twins = Twins(second_moment="block", update_proj_gap=3)

    def replayed(steps=1, **gradients):
        before = sum(graph.replays for graph in recorded)
        for _ in range(steps):
            twins.step(**gradients)
        return sum(graph.replays for graph in recorded) - before

    assert replayed(9) == 5
    one = twins.nets[0]["embed"].weight
    twins.optimizers[0].observer = ResidualProbe()
    assert replayed() == 0
    twins.optimizers[0].observer = None
    assert replayed() == 1
    for optimizer in twins.optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0.3
    assert replayed(3) == 0  # twice without another thought, then as if it would stay so
    one.data = one.detach().clone()
    assert replayed() == 0
    state = twins.optimizers[0].state[one]
    state["exp_avg_sq"] = state["exp_avg_sq"].clone()
    assert replayed() == 0
    state["exp_avg_sq"].data = state["exp_avg_sq"].clone()
    assert replayed() == 0
    assert replayed(missing={"embed.weight"}) == 0
    assert replayed(16) > 0  # the embedding is a step behind
    assert {row.launches for row in twins.optimizers[0].step_paths()} == {"replayed"}
    for optimizer in twins.optimizers:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert replayed() == 0
    assert replayed(9) > 0
    seen = [weakref.ref(param.grad) for param in twins.nets[0].parameters()]
    twins.optimizers[0].zero_grad()
    assert all(reference() is None for reference in seen)
    assert copy.deepcopy(twins.optimizers[0]).cached_bytes() == 0 < twins.optimizers[0].cached_bytes()


def test_groups_have_rates_of_their_own(recorded):
    twins = Twins()
    for net, optimizer in zip(twins.nets, twins.optimizers, strict=True):
        params = [param for group in optimizer.param_groups for param in group["params"]]
        assert len(params) == len(list(net.parameters()))
        optimizer.param_groups[0]["params"] = params[:2]
        optimizer.add_param_group({"params": params[2:], "lr": 1e-2, "n_head": 2})
    for step in range(12):
        for optimizer in twins.optimizers:
            optimizer.param_groups[1]["lr"] = 1e-3 * step if step % 4 else 1e-2  # equal rates step together
        twins.step()
    assert sum(graph.replays for graph in recorded) > 0


def test_all_that_moves_inside_backward_is_recorded_or_nothing(recorded):
    """With a limit between the temporaries of those that move together."""
    twins = Twins(update_in_backward=True)
    twins.step()
    sizes = [recorder._sized[1] for recorder in twins.optimizers[0]._engine._recorders.values()]
    twins.optimizers[0].most_recorded_bytes = (min(sizes) + max(sizes)) // 2
    for _ in range(3):
        twins.step()
    assert not recorded and "bytes would be kept" in twins.optimizers[0].step_paths()[0].launches


def test_a_replay_calls_no_python_for_a_parameter(recorded):
    """The host would need longer for hundreds of them than the GPU."""

    def calls(depth):
        net = model(depth=depth)
        options = {"rank": 2, "update_proj_gap": 100, "momentum": "compact", "roles": {"q_proj": "query"}}
        optimizer = AdaPM([{"params": net.named_parameters(), "n_head": 2}], **options)
        for param in net.parameters():
            param.grad = torch.ones_like(param)
        while not any(graph.replays for graph in recorded):
            optimizer.step()
        recorded.pop().calls.clear()
        made = []
        sys.setprofile(lambda frame, event, _: made.append(frame.f_code.co_name) if event == "call" else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        assert "replay" in made
        return sorted(made)

    assert calls(depth=2) == calls(depth=3)


@pytest.mark.parametrize("why", ["capture", "bytes"])
def test_what_cannot_be_recorded_is_launched(recorded, monkeypatch, why):
    twins = Twins()
    if why == "bytes":
        twins.optimizers[0].most_recorded_bytes = 1000
    else:
        monkeypatch.setattr(graphs, "captured", lambda *args: torch.empty(-1))
    for _ in range(5):
        twins.step()
    reason = twins.optimizers[0].step_paths()[0].launches
    assert ("negative dimension" if why == "capture" else "bytes") in reason
    assert not recorded
