"""Options of parameter groups, in every form that the constructor takes them in."""

import pytest
import torch
from models import PlainLM
from torch import nn

from lightning_adapm import AdamMini, AdaPM, LoRAPre, PartialMuon


def optimizer_of(group, make=AdaPM, **options):
    torch.manual_seed(0)
    params = [("mlp.weight", nn.Parameter(torch.randn(6, 9))), ("norm.weight", nn.Parameter(torch.ones(9)))]
    optimizer = make([{"params": params, **group}], **{"rank": 1, **options} if make is not AdamMini else options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for _, param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("state_dtype", torch.bfloat16),
        ("state_dtype", "torch.bfloat16"),
        ("state_dtype", {"low_rank": "float16"}),
        ("state_dtype", {"full": torch.int8}),
        ("state_dtype", "auto"),
        ("no_decay", "norm"),
        ("no_decay", ("norm", "mlp")),
        ("no_decay", None),
        ("momentum", "full"),
        ("momentum", {"mlp": "none"}),
        ("momentum", None),
        ("betas", [0.8, 0.9]),
    ],
)
@pytest.mark.parametrize("make", [AdaPM, PartialMuon])
def test_a_group_may_state_what_the_constructor_takes(make, option, value):
    group, whole = optimizer_of({option: value}, make), optimizer_of({}, make, **{option: value})
    for shown in (option, "state_dtype"):  # the default of which depends on the momentum
        assert group.param_groups[0][shown] == whole.param_groups[0][shown]
    for one, other in zip(group.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
        assert torch.equal(one, other)
    late = make([("mlp.1.weight", nn.Parameter(torch.ones(3, 4)))])
    late.add_param_group({"params": [("norm.weight", nn.Parameter(torch.ones(9)))], option: value})
    assert late.param_groups[1][option] == whole.param_groups[0][option]


def test_policies_of_a_group_are_added_to_those_of_the_optimizer():
    optimizer = optimizer_of({"momentum": {"mlp": "none"}}, momentum={"norm": "none"})
    assert not any("exp_avg" in state for state in optimizer.state.values())


@pytest.mark.parametrize("make", [AdaPM, AdamMini, LoRAPre, PartialMuon])
@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", torch.float8_e5m2, "int4", torch.uint8, torch.int64, "a word", torch.complex64, 3]
)
def test_state_dtypes_that_nothing_computes_with(make, dtype):
    for given in ({"state_dtype": dtype}, {}):
        options = {} if given else {"state_dtype": dtype}
        with pytest.raises(
            ValueError, match="state_dtype must be one of int8, bfloat16, float16, float32, float64, but got"
        ):
            optimizer_of(given, make, **options)


def test_options_of_other_optimizers_stay_the_callers():
    """Groups of torch.optim.SGD, for instance, have a number under momentum."""
    assert optimizer_of({"momentum": 0.9, "mu": "any"}, AdamMini).param_groups[0]["momentum"] == 0.9
    with pytest.raises(
        ValueError, match="momentum must be one of .*, or policies by role, but got 0.9; the decay .* betas"
    ):
        optimizer_of({"momentum": 0.9})


@pytest.mark.parametrize("value", ["1e-3", "0.1"])
def test_numbers_as_text(value):
    """As YAML reads 1e-3."""
    message = f"lr must be a finite number >= 0, but got '{value}', which is text: .* 1.0e-3 as"
    with pytest.raises(ValueError, match=message):
        optimizer_of({}, lr=value)


def test_roles_for_names_that_no_parameter_has():
    """A misspelt name would change nothing in silence; one of a part that another group trains is no mistake."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.warns(
        UserWarning, match=r"roles: no parameter has a name that '\^2', 'mpl' matches.*such as '0.weight'"
    ):
        AdaPM(model[0].parameters(), roles={"^2": "mlp", "0": "mlp", "^1.weight": "full", "mpl": "mlp"})


def test_maximize_and_no_decay():
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    norm = nn.Parameter(torch.ones(4))
    optimizer = AdaPM(
        [("mlp.weight", weights[0]), ("norm.weight", norm)], lr=0.1, weight_decay=0.5, no_decay=("norm",), maximize=True
    )
    for p in (weights[0], norm):
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(norm.detach(), torch.full((4,), 1.1))
    torch.testing.assert_close(weights[0].detach(), torch.full((4, 4), 1.05))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("lr", -1.0, "lr must be a finite number >= 0, but got -1.0"),
        ("lr", float("inf"), "lr must be a finite number >= 0, but got inf"),
        ("weight_decay", True, "weight_decay must be a finite number >= 0, but got True"),
        ("betas", (0.9, 1.0), r"betas must be two numbers in \[0, 1\)"),
        ("betas", (0.9,), "betas must be"),
        ("eps", -1e-8, "eps must be"),
        ("weight_decay", -0.1, "weight_decay must be"),
        ("rank", 0, "rank must be an int >= 1, or a float"),
        ("rank", 1.5, "rank must be"),
        ("rank", True, "rank must be"),
        ("rank", "5%", "rank must be"),
        ("update_proj_gap", 0, "update_proj_gap must be an int >= 1"),
        ("update_proj_gap", 2.5, "update_proj_gap must be"),
        ("second_moment", "rows", "elementwise, block, factored"),
        ("clip_threshold", 0.0, "clip_threshold must be"),
        ("momentum", {"mpl": "full"}, "'mpl' is not a role; the roles are embedding"),
        ("momentum", "papr", "'full', 'paper', 'compact', or policies by role, but got 'papr'"),
        ("momentum", {"mlp": "ful"}, r"momentum\['mlp'\]: 'ful' is not a policy"),
        ("roles", {"x": "keys"}, r"roles\['x'\]: 'keys' is neither a role"),
        ("unmatched", "warn", "unmatched must be 'error' or one of"),
        ("no_decay", ("norms",), "no_decay: 'norms' is not a role"),
        ("state_dtype", {"none": "int8"}, "'none' is not a policy with a state; write 'low_rank' or 'full'"),
        ("state_dtype", "int4", "state_dtype must be one of int8, bfloat16, float16, float32, float64, but got 'int4'"),
    ],
)
def test_options_out_of_range(option, value, words):
    with pytest.raises(ValueError, match=words):
        AdaPM(PlainLM().parameters(), **{option: value})


@pytest.mark.parametrize("unmatched", ["error", "none"])
def test_a_name_stands_for_a_table_of_momentum(unmatched):
    paper = AdaPM(PlainLM().parameters(), momentum="paper", unmatched=unmatched).param_groups[0]["momentum"]
    published = {"embedding": "none", "attn_out": "none", "query": "low_rank", "key": "low_rank", "mlp": "low_rank"}
    assert paper.items() >= published.items() and paper["value"] == "full"
    compact = AdaPM(PlainLM().parameters(), momentum="compact", unmatched=unmatched).param_groups[0]["momentum"]
    low_rank = {"embedding", "query", "key", "attn_out", "mlp", "lm_head"}
    assert {role for role, policy in compact.items() if policy == "low_rank"} == low_rank
    assert paper.get("unmatched") == (None if unmatched == "error" else unmatched)
    every = AdaPM(PlainLM().parameters(), momentum="full", unmatched=unmatched).param_groups[0]["momentum"]
    assert set(every.values()) == {"full"} and "unmatched" in every


def test_options_of_a_group_are_checked_too():
    with pytest.raises(ValueError, match="rank must be"):
        AdaPM([{"params": PlainLM().parameters(), "rank": -1}])
    with pytest.raises(ValueError, match="role: 'mpl' is neither a role"):
        AdaPM([{"params": PlainLM().parameters(), "role": "mpl"}])
