"""The table of roles: what it says of models of every kind, before anything is trained."""

import copy
import pickle

import pytest
import torch
from litgpt import GPT, Config
from models import PlainLM, PlainTraining, tiny_gpt
from torch import nn

from lightning_adapm import AdaPM, AdaPMMixin, explain
from lightning_adapm.report.explain import compare
from lightning_adapm.report.plan import plan
from lightning_adapm.report.tables import as_text, summarize, summary_table


class Unknown(nn.Module):
    """Two gadgets that no rule knows, and a vector."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"mixer": nn.Linear(6, 8, bias=False)}) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(5))


class Opaque(nn.Module):
    """A fused weight whose heads nobody knows."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(8, 20, bias=False)})


def by_name(explanation):
    return {row.name: row for row in explanation}


def test_says_the_role_and_the_rule():
    rows = by_name(explain(PlainLM()))
    assert {
        name: (rows[name].role, rows[name].why, rows[name].policy)
        for name in ("embed_tokens.weight", "layers.0.self_attn.v_proj.weight", "layers.1.norm_2.bias")
    } == {
        "embed_tokens.weight": ("embedding", "used by nn.Embedding", "full"),
        "layers.0.self_attn.v_proj.weight": ("value", "lies in an attention module", "full"),
        "layers.1.norm_2.bias": ("bias", "a vector", "full"),
    }
    assert rows["lm_head.weight"].why == "has the shape of an embedding"
    assert rows["layers.0.mlp.2.weight"].why == "name 'mlp'"
    taught = by_name(explain(PlainLM(), roles={r"^lm_head": "mlp"}))["lm_head.weight"]
    assert (taught.role, taught.why) == ("mlp", "roles['^lm_head']")


def test_rows_of_fused_weights():
    fused = [row.rows for row in explain(tiny_gpt()) if row.name.endswith("h.0.attn.qkv.weight")]
    assert fused == ["rows 0:32", "rows 32:48", "rows 48:64"]

    class GPTNeoXAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_attention_heads = 4
            self.query_key_value, self.dense = nn.Linear(32, 96), nn.Linear(32, 32)

    rows = [row.rows for row in explain(nn.ModuleList([GPTNeoXAttention()])) if row.name == "0.query_key_value.weight"]
    assert rows == ["rows 0:8 of every 24", "rows 8:16 of every 24", "rows 16:24 of every 24"]


def test_columns_of_a_transposed_weight():
    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(inputs, outputs))

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.c_attn, self.c_proj = 2, Conv1D(24, 8), Conv1D(8, 8)

    rows = [row.rows for row in explain(Attention()) if row.name == "c_attn.weight"]
    assert rows == ["columns 0:8", "columns 8:16", "columns 16:24"]


@pytest.mark.filterwarnings("error")
def test_unmatched_is_shown_and_not_raised():
    explanation = explain(Unknown())
    assert [row.name for row in explanation.unmatched] == ["blocks.0.mixer.weight", "blocks.1.mixer.weight"]
    text = str(explanation)
    assert "unmatched" in text and "nothing matches" in text
    paste = text[text.index("roles={") + len("roles=") : text.index("}") + 1]
    assert not explain(Unknown(), roles=eval(paste)).unmatched
    with pytest.raises(ValueError, match="the role of 2 matrices is not known"):
        AdaPM(Unknown().named_parameters())


def test_an_unmatched_policy_is_shown_without_advice():
    explanation = explain(Unknown(), unmatched="none")
    assert {row.policy for row in explanation.unmatched} == {"none"}
    assert "State it" not in str(explanation)


def test_fused_rows_that_cannot_be_told_apart_are_shown():
    (row,) = explain(Opaque())
    assert (row.role, row.why) == ("unmatched", "query, key and value rows that cannot be told apart")
    with pytest.raises(ValueError, match="which rows are whose"):
        AdaPM(Opaque().named_parameters())
    with pytest.warns(UserWarning, match="attn.qkv.weight"):
        optimizer = AdaPM(Opaque().named_parameters(), unmatched="full")
    assert [row.policy for row in plan(optimizer)] == ["full"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"second_moment": "bock"}, ValueError),
        ({"roles": {"x": "wheel"}}, ValueError),
        ({"rnak": 3}, TypeError),
    ],
)
def test_options_out_of_range_raise(options, error):
    with pytest.raises(error, match=next(iter(options))):
        explain(PlainLM(), **options)


def test_wrapped_compiled_and_meta_models_are_the_same():
    expected = [(row.role, row.rows, row.bytes) for row in explain(PlainLM())]
    with torch.device("meta"):
        meta = PlainLM()
    for model in (meta, nn.DataParallel(PlainLM()), torch.compile(PlainLM(), backend="eager")):
        assert [(row.role, row.rows, row.bytes) for row in explain(model)] == expected


def test_an_optimizer_is_explained_as_it_is():
    optimizer = AdaPM(PlainLM().named_parameters(), rank=2, second_moment="block")
    assert list(explain(optimizer)) == plan(optimizer)
    with pytest.raises(TypeError, match="rank"):
        explain(optimizer, rank=3)
    with pytest.raises(TypeError, match="needs a module or an optimizer of the package, but got list"):
        explain([])


def test_reasons_outlive_a_copy_and_stay_out_of_checkpoints():
    model = PlainLM()
    optimizer = AdaPM(model.named_parameters())
    assert [row.why for row in explain(copy.deepcopy(optimizer))] == [row.why for row in explain(optimizer)]
    assert b"used by nn.Embedding" not in pickle.dumps(optimizer.state_dict())


def test_the_mixins_settings_count_and_options_override_them():
    import lightning as L

    class Module(AdaPMMixin, PlainTraining, L.LightningModule):
        adapm = {"rank": 1, "second_moment": "block", "warmup_steps": 5}  # noqa: RUF012

    module = Module()
    assert explain(module).total == explain(module.net, rank=1, second_moment="block").total
    assert explain(module, rank=2).total == explain(module.net, rank=2, second_moment="block").total


def test_parameter_groups_say_why():
    model = PlainLM()
    groups = [{"params": [model.lm_head.weight, model.norm.bias], "role": "lm_head"}]
    assert [row.why for row in explain(AdaPM(groups))] == [
        "said by its parameter group",
        "a vector in a group of matrices",
    ]


def test_frozen_parameters_are_counted_and_cost_nothing():
    model = PlainLM()
    model.layers.requires_grad_(False)
    explanation = explain(model)
    assert explanation.frozen == sum(p.numel() for p in model.layers.parameters())
    assert explanation.parameters + explanation.frozen == sum(p.numel() for p in model.parameters())
    assert "frozen parameters: no state" in str(explanation)


def test_every_row_and_the_total_are_printed():
    explanation = explain(tiny_gpt())
    lines = str(explanation).splitlines()
    for row in explanation:
        assert any(line.split()[0] == row.name and row.role in line for line in lines if line.strip())
    assert any(line.split()[:2] == ["total", "19.4"] for line in lines if line.strip())


@pytest.mark.parametrize("name", ["[bold]", "[/red]", "a[0]"])
def test_names_are_printed_as_they_are(name):
    explanation = explain(nn.ModuleDict({name: nn.Embedding(4, 4)}))
    by_parameter = as_text(summary_table(summarize(explanation, "parameter"), "parameter", 9))
    assert f" {name}.weight " in str(explanation) and f" {name}.weight (embedding) " in by_parameter


def test_compare_leaves_out_what_needs_unknown_heads():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    assert set(compare(Attention())) == {"AdaPM", "AdaPM factored", "PartialMuon"}
    assert set(compare(PlainLM())) == {"Adam-mini", "AdaPM", "AdaPM factored", "PartialMuon"}


def test_a_model_of_405_billion_parameters():
    with torch.device("meta"):
        model = GPT(Config.from_name("Llama-3.1-405B"))
    explanation = explain(model)
    assert explanation.parameters == 405_853_388_800
    assert explanation.adamw.total == 8 * explanation.parameters + 4 * sum(1 for _ in model.parameters())
