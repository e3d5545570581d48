"""``lightning-adapm plan``: models by name, recipe and class; what it refuses, and with which words and status."""

import json
import re

import pytest
import torch
import yaml
from commands import QUICKSTART, QUICKSTART_ADAMW, run
from models import PlainLM, tiny_gpt
from torch import nn

from lightning_adapm import AdaLomo, AdamMini, LoRAPre
from lightning_adapm.commands import plan as plan_command
from lightning_adapm.litgpt.module import LitGPTModule
from lightning_adapm.report.explain import explain
from lightning_adapm.report.tables import show_bytes


class Gadget(nn.Module):
    """Has a matrix that no rule knows."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.gadget = nn.Parameter(torch.ones(width, 6))


class Headless(nn.Module):
    """Does not say how many heads its attention has."""

    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})


def on_meta(*args, **options):
    with torch.device("meta"):
        return LitGPTModule(*args, **options)


def test_a_model_by_name(plan):
    status, out, _, totals = plan("--model_name", "pythia-14m", "--dtype", "bfloat16", "--rank", "3")
    model = on_meta("pythia-14m").bfloat16()
    ours = explain(model, rank=3)
    assert status == 0
    assert totals == {
        "AdamW": show_bytes(ours.adamw_in_dtype.total),
        "Adam-mini": show_bytes(explain(model, momentum="full", second_moment="block", state_dtype=None).total.total),
        "AdaPM": show_bytes(ours.total.total),
        "AdaPM factored": show_bytes(explain(model, rank=3, second_moment="factored").total.total),
    }
    assert "saved of AdamW in float32" in out and "saved of AdamW in bfloat16" in out
    assert "attn.qkv.weight" not in out


def test_every_parameter_on_demand(plan):
    _, out, _, _ = plan("--model_name", "pythia-14m", "--explain")
    for row in explain(on_meta("pythia-14m")):
        assert row.name in out


def test_options_have_adapms_names_and_defaults(plan):
    status, out, _, _ = plan("--help")
    assert status == 0
    for option in ("rank", "second_moment", "momentum", "roles", "unmatched", "state_dtype"):
        assert f"--{option} " in out
    assert "--lr" not in out


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--state_dtype=bfloat16"], {"state_dtype": "bfloat16"}),
        (["--second_moment=factored"], {"second_moment": "factored"}),
        (["--momentum=none"], {"momentum": "none"}),
        (["--momentum.mlp=full"], {"momentum": {"mlp": "full"}}),
        (['--roles={"attn.proj.weight$": "full"}'], {"roles": {r"attn.proj.weight$": "full"}}),
    ],
)  # fmt: skip
def test_options_of_every_type(plan, words, options):
    *_, totals = plan("--model_name", "pythia-14m", *words)
    assert totals["AdaPM"] == show_bytes(explain(on_meta("pythia-14m"), **options).total.total)


def test_a_recipe_and_what_overrides_it(plan, tmp_path, monkeypatch):
    fields = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]["config"]
    *_, totals = plan("--config", QUICKSTART)
    assert totals["AdaPM"] == show_bytes(explain(on_meta(config=fields)).total.total)
    words = ["--model.config.n_layer=2", "--model.init_args.adapm.rank=2"]
    *_, totals = plan("--config", QUICKSTART, "--config", QUICKSTART_ADAMW, *words)
    assert totals["AdaPM"] == show_bytes(explain(on_meta(config=fields | {"n_layer": 2}), rank=2).total.total)
    *_, totals = plan("--config", QUICKSTART, *words, "--rank=7")
    assert totals["AdaPM"] == show_bytes(explain(on_meta(config=fields | {"n_layer": 2}), rank=7).total.total)


def test_a_recipe_with_adapm_as_its_optimizer_and_a_precision(plan, tmp_path):
    recipe = {
        "trainer": {"precision": "bf16-true"},
        "model": {
            "class_path": "lightning_adapm.litgpt.LitGPTModule",
            "init_args": {"model_name": "pythia-14m", "adapm": {"rank": 9}},
        },
        "optimizer": {"class_path": "lightning_adapm.AdaPM", "init_args": {"lr": 0.1, "second_moment": "block"}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, out, _, totals = plan("--config", tmp_path / "recipe.yaml")
    assert "parameters in bfloat16" in out
    model = on_meta("pythia-14m").bfloat16()
    assert totals["AdaPM"] == show_bytes(explain(model, second_moment="block").total.total)


def test_numbers_are_read_as_fit_reads_them(plan, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model_name: pythia-14m\noptimizer: {class_path: lightning_adapm.AdaPM, init_args: {lr: 1e-3, rank: 5e-2}}\n"
    )
    status, *_, totals = plan("--config", tmp_path / "recipe.yaml")
    assert status == 0
    assert totals["AdaPM"] == show_bytes(explain(on_meta("pythia-14m"), rank=0.05).total.total)


def test_null_is_a_fields_default(plan):
    words = ["--model_name=pythia-14m", "--model.config.n_query_groups=null"]
    assert plan(*words)[3] == plan("--model_name=pythia-14m")[3]


def test_a_model_without_parameters(plan):
    assert "empty parameter list" in plan("--model=torch.nn.Identity")[0]


@pytest.mark.parametrize(
    "recipe",
    [
        {"model_name": "pythia-14m", "precision": "bf16-true"},
        {"model_name": "other", "model_config": {"name": "pythia-14m", "n_layer": 2}},
    ],
)
def test_a_recipe_of_litgpts_own(plan, tmp_path, recipe):
    optimizer = {"class_path": "lightning_adapm.AdaPM", "init_args": {"rank": 5}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"optimizer": optimizer}))
    status, _, _, totals = plan("--config", tmp_path / "recipe.yaml")
    model = on_meta(config=recipe["model_config"]) if "model_config" in recipe else on_meta("pythia-14m").bfloat16()
    assert status == 0
    assert totals["AdaPM"] == show_bytes(explain(model, rank=5).total.total)


def test_gpt2_xl_by_its_fields(plan):
    """1.5 billion parameters: 48 layers of width 1600, 25 heads, biases, a tied head."""
    fields = {
        "n_layer": 48, "n_embd": 1600, "n_head": 25, "padded_vocab_size": 50257, "block_size": 1024, "bias": True
    }  # fmt: skip
    words = [f"--model.config.{name}={value}" for name, value in fields.items()]
    _, out, _, totals = plan("--model=lightning_adapm.litgpt.LitGPTModule", "--model.tie_embeddings=true", *words)
    assert "1.6 B parameters" in out and "lm_head" not in out
    parameters = 50257 * 1600 + 48 * (12 * 1600**2 + 13 * 1600) + 2 * 1600
    model = on_meta(config=fields, tie_embeddings=True)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert totals["AdamW"] == show_bytes(8 * parameters)


def test_any_module_by_its_class(plan):
    status, _, _, totals = plan("--model", "models.PlainLM", "--model.width=48")
    assert status == 0
    assert totals["AdaPM"] == show_bytes(explain(PlainLM(width=48)).total.total)


def test_unmatched_matrices_end_with_status_1_and_what_to_write(plan):
    status, out, _, totals = plan("--model", f"{__name__}.Gadget")
    assert status == 1 and "AdaPM" in totals
    assert "gadget  (4, 6)" in out
    (roles,) = re.findall(r"--roles='(\{.*?\})'", out)
    assert json.loads(roles) == {"^gadget$": "full"}
    for chosen in (f"--roles={roles}", "--unmatched=full"):
        status, out, _, _ = plan("--model", f"{__name__}.Gadget", chosen)
        assert status == 0 and "State it" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which model? Give --model_name NAME"),
        (["--rank=3"], "which model?"),
        (["--model_nme=pythia-14m"], "Unrecognized arguments: --model_nme=pythia-14m; did you mean --model_name?"),
        (["--model_nam=pythia-14m"], "did you mean --model_name?"),
        (["--model_name=pythia-14m", "--fits=24"], "--fits: a size must be a number with KiB"),
        (["--model_name=pythia-14m", "--dtype=float8"], "argument --dtype: invalid choice: 'float8'"),
        (["--model_name=pythia-14m", f"--config={QUICKSTART}"], "--model_name and --config each describe the model"),
        (["--model_name=pythia-14m", "--model=models.PlainLM"], "--model_name and --model each describe the model"),
        (["--model_name=pythia-14n"], "no model_name 'pythia-14n'; did you mean pythia-14m"),
        (["--model_name=meta-llama/llama-3-8b"], "did you mean Llama-3-8B"),
        (["--config=nowhere.yaml"], "there is no file 'nowhere.yaml'"),
        (["--model_name=pythia-14m", "--rnak=3"], "--rnak=3"),
        (["--model_name=pythia-14m", "--rank=-3"], "rank must be an int >= 1"),
        (["--model_name=pythia-14m", "--second_moment=bock"], "second_moment must be one of"),
        (["--model_name=pythia-14m", "--model.config.n_heads=3"], "no field 'n_heads'; did you mean 'n_head'?"),
    ],
)
def test_bad_input_is_named_without_a_traceback(plan, words, message):
    status, *_ = plan(*words)
    assert message in status and len(status.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("trainer: {max_steps: 3}", "has no `model`"),
        ("model: {n_layer: 3}", "`model` has no class_path"),
        ("- model", "is not a recipe"),
        ("model: [1", "recipe.yaml is not YAML: while parsing a flow sequence"),
    ],
)
def test_a_file_that_is_no_recipe(plan, tmp_path, content, message):
    (tmp_path / "recipe.yaml").write_text(content)
    status, *_ = plan("--config", tmp_path / "recipe.yaml")
    assert message in status


def test_modules_that_build_themselves_late(plan, monkeypatch):
    def build(self):
        self.net = tiny_gpt()

    monkeypatch.setattr(LitGPTModule, "__init__", lambda self: super(LitGPTModule, self).__init__())
    monkeypatch.setattr(LitGPTModule, "configure_model", build, raising=False)
    *_, totals = plan("--model", "lightning_adapm.litgpt.LitGPTModule")
    assert totals["AdaPM"] == show_bytes(explain(tiny_gpt()).total.total)


def test_no_weight_takes_memory(monkeypatch, plan):
    seen = []
    report = plan_command._report
    monkeypatch.setattr(
        plan_command, "_report", lambda found, *rest: (seen.append(found.model), report(found, *rest))[1]
    )
    assert plan("--model_name", "Llama-3.1-405B")[0] == 0
    assert {param.device.type for param in seen[0].parameters()} == {"meta"}


def test_an_error_as_a_user_meets_it(tmp_path):
    """A plan as a user starts it is part of ``make package``."""
    failed = run(tmp_path, "plan", "--model_name", "pythia-14n", check=False)
    assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1


def test_a_module_that_names_partial_muon(plan):
    status, out, *_ = plan("--config", QUICKSTART, "--model.adapm.optimizer=partial_muon")
    assert status == 0 and "PartialMuon: optimizer state" in out


def test_a_model_without_heads_has_no_plan_of_what_needs_them(plan):
    status, out, *_ = plan("--model", f"{__name__}.Headless")
    assert status == 0 and "No Adam-mini: no attention module has a number of heads" in out


def test_a_plan_of_a_checkpoint_reads_no_weights(plan, caplog):
    with caplog.at_level("INFO"):
        assert plan("--config", "recipe:finetune/pythia-1b-full")[0] == 0
    assert "weights: " not in caplog.text


@pytest.mark.parametrize(("name", "make"), [("lora-pre", LoRAPre), ("adalomo", AdaLomo), ("adam-mini", AdamMini)])
def test_a_recipe_with_a_neighbor_as_its_optimizer(plan, name, make):
    status, out, *_ = plan("--config", QUICKSTART, "--config", QUICKSTART.with_stem(f"quickstart-{name}"))
    assert status == 0
    total = next(line for line in out.splitlines() if line.startswith("  total"))
    fields = yaml.safe_load(QUICKSTART.read_text())["model"]["init_args"]["config"]
    optimizer = make(on_meta(config=fields).named_parameters())
    assert re.split(r" {2,}", total.strip())[-1] == show_bytes(explain(optimizer).total.total)
    assert f"{make.__name__}: optimizer state" in out


def test_the_optimizer_of_the_last_file_has_no_options_of_those_before(plan, tmp_path):
    before = tmp_path / "before.yaml"
    before.write_text("optimizer: {class_path: lightning_adapm.LoRAPre, init_args: {rank: 3}}")
    files = (QUICKSTART, before, QUICKSTART.with_stem("quickstart-adalomo"))
    status, out, *_ = plan(*(word for file in files for word in ("--config", file)))
    assert status == 0 and "AdaLomo: optimizer state" in out
