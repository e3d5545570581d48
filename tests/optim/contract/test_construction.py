"""The contract of ``torch.optim.Optimizer``: how it is built.

Nothing here is about what an optimizer computes. ``torch.optim.AdamW`` passes too, as the reference.
"""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from contract import Net, equal, tensors_in, train, trained
from optimizers import REFERENCE
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:update_in_backward=True frees no gradient early"),
    pytest.mark.filterwarnings("ignore:.* found no gradient on any of its parameters"),
]


def test_parameters_may_be_given_in_any_form(case):
    def groups(named):
        named = list(named)
        return [{"params": named[:2]}, {"params": iter(named[2:]), "lr": 1e-2}]

    forms = [lambda named: named, list, tuple, lambda named: iter(list(named)), groups]
    found = []
    for form in forms:
        model = Net()
        optimizer = case(form(model.named_parameters()))
        held = [param for group in optimizer.param_groups for param in group["params"]]
        assert all(p is q for p, q in zip(held, model.parameters(), strict=True))
        train(model, optimizer)
        found.append(model)
    assert all(equal(each, found[0]) for each in found)


def test_one_named_parameter_as_a_group(case):
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = case([{"params": [("mlp.weight", weight)]}])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert (weight != 1).all()


@pytest.mark.parametrize("params", [None, 3, torch.ones(2, 2), {torch.ones(2, 2)}], ids=["None", "3", "tensor", "set"])
def test_what_is_no_collection_of_parameters(case, params):
    with pytest.raises(TypeError):
        case([{"params": params}] if isinstance(params, set) else params)


def test_what_is_no_parameter(case):
    with pytest.raises(ValueError, match="empty parameter list"):
        case([])
    with pytest.raises(TypeError):
        case([("mlp.weight", "a string")])
    with pytest.raises(ValueError, match="non-leaf"):
        case([("mlp.weight", torch.ones(2, 2, requires_grad=True) * 2)])
    weight = torch.ones(2, 2, requires_grad=True)
    with pytest.raises((TypeError, ValueError)):
        case([("mlp.weight", weight), torch.ones(2, 2, requires_grad=True)])


def test_one_parameter_twice(case):
    weight = nn.Parameter(torch.ones(4, 3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        case([{"params": [("mlp.weight", weight)]}, {"params": [("mlp.weight", weight)]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        case([("mlp.weight", weight), ("mlp.weight", weight)])


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("lr", torch.tensor(-1.0)),
        ("lr", torch.tensor([1e-3, 1e-3])),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("eps", -1e-8),
        ("weight_decay", -1),
        ("clip_threshold", -1.0),
        ("rank", 0),
        ("update_proj_gap", 0),
        ("update_proj_gap", "10"),
        ("maximize", "false"),
        ("debias", "no"),
        ("nesterov", None),
        ("convolutions", "x"),
        ("update_in_backward", "False"),
        ("betas", "0.9,0.95"),
        ("no_decay", 5),
        ("roles", "mlp"),
        ("roles", {"(": "mlp"}),
        ("roles", {3: "mlp"}),
    ],
)
def test_options_out_of_range(case, option, wrong):
    if not case.takes(option) or (case is REFERENCE and isinstance(wrong, str)):
        pytest.skip(f"without {option}")
    words = {"lr": "lr|learning rate", "eps": "eps", "betas": "beta"}.get(option, option)
    with pytest.raises(ValueError, match=f"(?i){words}"):
        case(Net().named_parameters(), **{option: wrong})


def test_complex_parameters(case):
    """AdamW takes them; an optimizer that does not, says so before anything is trained."""
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    if case is REFERENCE:
        case([("mlp.weight", weight)])
        return
    with pytest.raises(TypeError, match="mlp.weight is complex"):
        case([("mlp.weight", weight)])


def test_every_option_is_documented_and_in_every_group(case):
    documented = inspect.getdoc(case.make)
    named = [
        name for name, each in inspect.signature(case.make).parameters.items() if each.kind is not each.VAR_KEYWORD
    ]
    assert all(f"{name}" in documented for name in named)
    model = Net()
    optimizer = case([{"params": [each]} for each in model.named_parameters()])
    assert {"lr", "weight_decay"} <= set(optimizer.defaults)
    for group in optimizer.param_groups:
        assert set(optimizer.defaults) <= set(group)
        assert len(group["param_names"]) == len(group["params"])


def test_it_can_be_printed(case):
    optimizer = case(Net().named_parameters(), lr=0.125)
    assert repr(optimizer).startswith(f"{case.make.__name__} (\nParameter Group 0\n")
    assert "    lr: 0.125\n" in repr(optimizer)
    train(Net(), optimizer, 0)
    repr(copy.deepcopy(optimizer))


def test_nothing_is_left_behind(case):
    """Models and optimizers that are no longer used are freed."""
    gc.freeze()
    model, optimizer = trained(case)
    gone = [
        weakref.ref(optimizer),
        weakref.ref(model.mlp[0].weight),
        *map(weakref.ref, tensors_in(optimizer.state)),
    ]
    assert len(gone) > 2
    del model, optimizer
    gc.collect()
    assert not any(each() is not None for each in gone)
