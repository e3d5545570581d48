"""The contract of ``torch.optim.Optimizer``: state dicts, copies and pickles.

Nothing here is about what an optimizer computes. ``torch.optim.AdamW`` passes too, as the reference.
"""

import copy
import pickle

import pytest
from contract import Net, equal, tensors_in, through_a_file, train, trained, values
from optimizers import REFERENCE

pytestmark = [
    pytest.mark.filterwarnings("ignore:update_in_backward=True frees no gradient early"),
    pytest.mark.filterwarnings("ignore:.* found no gradient on any of its parameters"),
]


def resumed(case, model, saved, **options):
    """Another optimizer of a copy of ``model`` that has loaded ``saved``."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    optimizer = case(twin.named_parameters(), **options)
    optimizer.load_state_dict(saved)
    return twin, optimizer


@pytest.mark.parametrize(
    ("steps", "how"),
    [(4, lambda saved: saved), (4, through_a_file), (0, through_a_file)],
    ids=["as it is", "file", "new"],
)
def test_a_resumed_run_is_the_same(case, how, steps):
    model, optimizer = trained(case, steps)
    saved = optimizer.state_dict()
    twin, other = resumed(case, model, copy.deepcopy(saved) if case is REFERENCE else how(saved), lr=0.7)
    assert other.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, 3, first=steps)
    train(twin, other, 3, first=steps)
    assert equal(model, twin)
    assert equal(tensors_in(optimizer.state), tensors_in(other.state))


def test_the_form_of_a_state_dict(case):
    model, optimizer = trained(case)
    saved, again = optimizer.state_dict(), optimizer.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert sorted(saved["state"]) == list(range(len(list(model.parameters()))))
    assert [group["params"] for group in saved["param_groups"]] == [list(range(len(saved["state"])))]
    assert saved["param_groups"] == again["param_groups"]
    assert [list(entry) for entry in saved["state"].values()] == [list(entry) for entry in again["state"].values()]
    assert all("step" in entry for entry in saved["state"].values())
    # as torch's, it has the tensors themselves
    assert all(p is q for p, q in zip(tensors_in(saved), tensors_in(dict(optimizer.state)), strict=True))


def test_loading_copies(case):
    """What is loaded stays as it was, whoever trains on; AdamW shares tensors with it, so that it is left out."""
    if case is REFERENCE:
        return
    model, optimizer = trained(case)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    twin, other = resumed(case, model, saved)
    train(twin, other)
    assert equal(tensors_in(saved), tensors_in(kept)) and saved["param_groups"] == kept["param_groups"]
    others = {tensor.data_ptr() for tensor in tensors_in(other.state) if tensor.numel()}
    assert not others & {tensor.data_ptr() for tensor in tensors_in(optimizer.state) if tensor.numel()}


def test_saves_without_later_options_or_names(case):
    """Of an older version: what is missing keeps this optimizer's value."""
    model, optimizer = trained(case)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in [key for key in group if key not in ("params", "lr", "betas", "eps", "weight_decay")]:
            del group[key]
    twin, other = resumed(case, model, saved)
    assert other.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


def test_steps_may_be_saved_as_numbers(case):
    model, optimizer = trained(case)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = float(entry["step"])
    twin, other = resumed(case, model, saved)
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


def test_a_state_that_does_not_fit_is_refused_before_anything_changes(case):
    model, optimizer = trained(case)
    groups = copy.deepcopy(optimizer.param_groups)
    state = {param: dict(entry) for param, entry in optimizer.state.items()}
    fewer = optimizer.state_dict()
    fewer["param_groups"] = [{**fewer["param_groups"][0], "params": fewer["param_groups"][0]["params"][:-1]}]
    more = optimizer.state_dict()
    more["param_groups"] = [*more["param_groups"], {**more["param_groups"][0], "params": []}]
    for saved in (fewer, more):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(saved)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == [
        {k: v for k, v in g.items() if k != "params"} for g in groups
    ]
    assert dict(optimizer.state) == state
    twin, other = trained(case)
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


def test_hooks_of_saving(case):
    _, optimizer = trained(case)
    seen = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda each: seen.append(("before", each is optimizer))),
        optimizer.register_state_dict_pre_hook(lambda each: seen.append(("first", each is optimizer)), prepend=True),
        optimizer.register_state_dict_post_hook(lambda _, saved: saved.__setitem__("extra", 1)),
        optimizer.register_state_dict_post_hook(lambda _, saved: {"inside": saved}),
    ]
    saved = optimizer.state_dict()
    assert seen == [("first", True), ("before", True)]
    assert list(saved) == ["inside"] and saved["inside"]["extra"] == 1
    for handle in handles:
        handle.remove()
    assert list(optimizer.state_dict()) == ["state", "param_groups"]


def test_hooks_of_saving_that_leave_something_out(case):
    _, optimizer = trained(case)
    optimizer.register_state_dict_post_hook(lambda _, saved: {"param_groups": saved["param_groups"]})
    assert list(optimizer.state_dict()) == ["param_groups"]


def test_hooks_of_loading(case):
    model, optimizer = trained(case)
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    twin = copy.deepcopy(model)
    other = case(twin.named_parameters())

    def unwrap(each, found):
        seen.append(("before", each is other, len(other.state)))
        return found["inside"]

    def after(each):
        seen.append(("after", each is other, len(other.state)))

    handles = [other.register_load_state_dict_pre_hook(unwrap), other.register_load_state_dict_post_hook(after)]
    other.load_state_dict({"inside": saved})
    assert seen == [("before", True, 0), ("after", True, len(saved["state"]))]
    for handle in handles:
        handle.remove()
    other.load_state_dict(saved)
    assert len(seen) == 2
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)


def test_deepcopy(case):
    model, optimizer = trained(case)
    twin, other = copy.deepcopy((model, optimizer))
    assert type(other) is type(optimizer)
    public = {key for key in vars(optimizer) if not key.startswith("_")}
    assert public <= set(vars(other))
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], twin.parameters(), strict=True))
    before = values(model)
    train(twin, other)
    assert equal(values(model), before)
    train(model, optimizer)
    assert equal(model, twin)


def test_pickle(case):
    model, optimizer = trained(case)
    twin, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert other.param_groups[0]["params"][0] is next(twin.parameters())
    train(model, optimizer)
    train(twin, other)
    assert equal(model, twin)
    repr(other)
    other.zero_grad()
    other.state_dict()


def test_subclasses_keep_their_attributes(case):
    class Own(case.make):
        """As a project derives its own."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.notes, self._secret = {"of": "mine"}, ["kept", "too"]

        def step(self, closure=None):
            self.notes["steps"] = self.notes.get("steps", 0) + 1
            return super().step(closure)

    model = Net()
    optimizer = Own(model.named_parameters(), **{"lr": 1e-2, **case.settings})
    train(model, optimizer)
    expected, _ = trained(case)
    assert equal(model, expected)
    assert optimizer.notes == {"of": "mine", "steps": 3}
    if case is not REFERENCE:  # AdamW forgets them
        other = copy.deepcopy(optimizer)
        assert other.notes == optimizer.notes and other.notes is not optimizer.notes
        assert other._secret == optimizer._secret and other._secret is not optimizer._secret
