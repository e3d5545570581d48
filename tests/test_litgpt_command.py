"""``lightning-adapm litgpt``: what it refuses before any work, what it adds to litgpt's logs, and litgpt's recipes."""

import csv
import sys
from pathlib import Path

import pytest
import yaml
from commands import RECIPES
from conftest import write_corpus
from finetuning import write_instructions
from jsonargparse import CLI, capture_parser
from litgpt.finetune import full, lora
from litgpt.pretrain import setup as pretrain
from litgpt_commands import FINETUNE, PRETRAIN, optimizer, run_litgpt, text_files, write_checkpoint

from lightning_adapm import litgpt_checks, litgpt_command

SETUPS = {"finetune_full": full.setup, "finetune_lora": lora.setup, "pretrain": pretrain}


@pytest.mark.parametrize("recipe", sorted((RECIPES / "litgpt").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_what_litgpts_commands_take(recipe):
    """The command is the one that the recipe's header says."""
    text = recipe.read_text()
    command = next(line for line in text.splitlines() if line.startswith("#   litgpt ")).split()[2]
    pytest.importorskip("requests" if "LitData" not in text else "litdata", reason="litgpt's data modules need it")
    parsed = capture_parser(lambda: CLI(SETUPS[command])).parse_args(["--config", str(recipe)])
    litgpt_checks.check_optimizer(parsed.optimizer)
    assert parsed.optimizer["init_args"] == yaml.safe_load(text)["optimizer"]["init_args"]
    assert parsed.train.global_batch_size % parsed.train.micro_batch_size == 0
    validate = SETUPS[command].__globals__["validate_args"]
    validate(parsed.train, parsed.eval, *((None, False) if command == "pretrain" else ()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of litgpt's commands pretrain, finetune, .*, but got none"),
        (["chat"], "but got 'chat'"),
    ],
)
def test_commands_that_do_not_train(words, message):
    with pytest.raises(ValueError, match=message):
        litgpt_command.run(words)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": {"class_path": "lightning_adapm.AdaPM"}}, ValueError, "needs class_path and init_args"),
        (
            {"optimizer": {"class_path": "lightning_adapm.AdaPN", "init_args": {}}},
            ValueError,
            "no class 'lightning_adapm.AdaPN'",
        ),
        (
            {"optimizer": {"class_path": "lightning_adapm.AdaPM", "init_args": {"rnak": 2}}},
            ValueError,
            "AdaPM has no option 'rnak'; did you mean 'rank'",
        ),
        (
            {"optimizer": {"class_path": "lightning_adapm.AdaPM", "init_args": {"rank": -2}}},
            ValueError,
            "rank must be an int >= 1",
        ),
        ({"model_name": "pythia-14n", "optimizer": "AdamW"}, ValueError, "no model_name 'pythia-14n'; did you mean"),
        ({"tokenizer_dir": Path("nowhere")}, FileNotFoundError, "`tokenizer_dir`: there is neither tokenizer.json"),
        ({"checkpoint_dir": Path("nowhere")}, FileNotFoundError, "`checkpoint_dir`: 'nowhere' does not exist"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, error, message):
    with pytest.raises(error, match=message):
        litgpt_checks.check(arguments)


def test_a_checkpoint_of_another_model(tmp_path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    litgpt_checks.check({"checkpoint_dir": folder, "optimizer": "AdamW"})
    with pytest.raises(ValueError, match="is of another model: lm_head.weight has shape"):
        litgpt_checks.check({"model_name": "pythia-14m", "initial_checkpoint_dir": folder})


def rows(folder):
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return [row for row in csv.DictReader(lines) if row.get("loss")]


@pytest.mark.slow
def test_pretrained_finetuned_and_generated_from(tmp_path):
    """From text to an answer, by litgpt's commands with our figures; the loss falls in both trainings."""
    pytest.importorskip("requests", reason="litgpt's command line needs it")
    pytest.importorskip("litdata", reason="TextFiles needs it")
    tokenizer, corpus = write_checkpoint(tmp_path / "checkpoint"), write_corpus(tmp_path / "text")
    instructions = write_instructions(tmp_path / "instructions.json", 24)
    words = ["litgpt", "pretrain", "pythia-14m", *text_files(corpus), *PRETRAIN]
    words += [f"--tokenizer_dir={tokenizer}", "--out_dir=pretrained", "--train.max_tokens=4096"]
    words += ["--train.lr_warmup_steps=2", optimizer("lightning_adapm.AdaPM", lr=1e-2, second_moment="block")]
    printed = run_litgpt(tmp_path, *words, module="lightning_adapm").stdout
    assert "Saved of AdamW's momentum" in printed
    logged = rows(tmp_path / "pretrained")
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"]) - 0.5
    assert 0 < float(logged[0]["optimizer/ratio_to_adamw"]) < 0.5
    assert float(logged[0]["residual/norm_mean/all"]) > 0

    words = [
        "litgpt",
        "finetune_full",
        "pretrained/final",
        "--data=JSON",
        f"--data.json_path={instructions}",
        *FINETUNE,
    ]
    words += ["--out_dir=finetuned", "--train.epochs=2", "--train.lr_warmup_steps=1"]
    words += [optimizer("lightning_adapm.AdaPM", lr=3e-3)]
    run_litgpt(tmp_path, *words, module="lightning_adapm")
    logged = rows(tmp_path / "finetuned")
    assert float(logged[-1]["loss"]) < float(logged[0]["loss"])
    words = ["generate", "finetuned/final", "--prompt=say red", "--max_new_tokens=4"]
    assert "say red" in run_litgpt(tmp_path, *words).stdout


def test_it_says_what_litgpts_command_line_lacks(monkeypatch):
    """litgpt needs requests without saying so."""
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"command line needs requests: pip install 'lightning-adapm\[litgpt\]'"
    ):
        litgpt_command.run(["pretrain"])
