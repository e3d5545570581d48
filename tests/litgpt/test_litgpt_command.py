"""``lightning-adapm litgpt``: what it refuses before any work, what it adds to litgpt's logs, and litgpt's recipes."""

import contextlib
import csv
import importlib
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from commands import RECIPES
from finetuning import write_instructions, write_tokenizer
from jsonargparse import CLI, capture_parser
from litgpt import Config
from litgpt.data import JSON, TextFiles
from litgpt.finetune import full, lora
from litgpt.pretrain import setup as pretrain
from litgpt_commands import FINETUNE, MODEL, PRETRAIN, optimizer, run_litgpt, text_files, write_checkpoint, write_text
from texts import write_corpus

from lightning_adapm.commands import litgpt as litgpt_command
from lightning_adapm.litgpt import checks as litgpt_checks
from lightning_adapm.litgpt.data import PreparedText

RECIPE = str(RECIPES / "litgpt" / "pretrain" / "quickstart.yaml")
SETUPS = {"finetune_full": full.setup, "finetune_lora": lora.setup, "pretrain": pretrain}


@pytest.mark.parametrize("recipe", sorted((RECIPES / "litgpt").rglob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_what_litgpts_commands_take(recipe):
    """The command is the one that the recipe's header says."""
    text = recipe.read_text()
    command = next(line for line in text.splitlines() if line.startswith("#   litgpt ")).split()[2]
    pytest.importorskip("requests" if "LitData" not in text else "litdata", reason="litgpt's data modules need it")
    parser = capture_parser(lambda: CLI(SETUPS[command]))
    parsed = parser.parse_args(["--config", str(recipe)])
    given = parsed.optimizer["init_args"]
    litgpt_checks.check_optimizer(parsed.optimizer)
    assert given == yaml.safe_load(text)["optimizer"]["init_args"]
    twin = parser.parse_args(["--config", str(recipe), "--config", re.search(r"--config='(.*)'", text)[1]]).optimizer
    assert twin["class_path"] == "torch.optim.AdamW"
    assert twin["init_args"] == {name: given[name] for name in ("lr", "betas", "weight_decay") if name in given}
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
        ({"optimizer": "lightning_adapm.AdaPN"}, ValueError, "no class 'lightning_adapm.AdaPN'"),
        ({"optimizer": "AdaPM"}, ValueError, "no class 'torch.optim.AdaPM'; write .*lightning_adapm.AdaPM"),
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
        (
            {"model_name": "pythia-14m", "tokenizer_dir": Path("nowhere")},
            FileNotFoundError,
            "`tokenizer_dir`: there is neither tokenizer.json",
        ),
        (
            {"model_name": "pythia-14m"},
            ValueError,
            "`data`: TinyLlama reads .* no folder 'data/slimpajama/train'; give",
        ),
        ({"checkpoint_dir": Path("nowhere")}, FileNotFoundError, "`checkpoint_dir`: 'nowhere' does not exist"),
        ({"devices": 99}, ValueError, "`devices`: litgpt shards over GPUs, and this machine has . instead of 99"),
        ({"resume": True, "out_dir": Path("nowhere")}, FileNotFoundError, "no checkpoint .* in 'nowhere'; .*auto"),
        ({"out_dir": Path(__file__, "out")}, ValueError, "`out_dir`: cannot write to '.*out' .*; give another folder"),
        ({"resume": Path("atuo")}, FileNotFoundError, "`resume`: 'atuo' does not exist"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, error, message):
    with pytest.raises(error, match=message):
        litgpt_checks.check(arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--optimizer.init_args.lr=1"],
            "--optimizer.init_args.lr: litgpt's parser does not put an optimizer together",
        ),
        (["--config", RECIPE, '--optimizer={"class_path": "x"}'], 'write --config=\'{"optimizer": '),
        ([f"--config={RECIPE}", "--optimizer", '{"class_path": "x"}'], 'write --config=\'{"optimizer": '),
        (
            [f"--config={RECIPE}", '--config={"optimizer": {"class_path": "lightning_adapm.Adapm"}}'],
            "no class 'lightning_adapm.Adapm'; write optimizer: ",
        ),
    ],
)
def test_ways_to_give_an_optimizer_that_litgpts_parser_drops(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        litgpt_command.run(["pretrain", *words])
    litgpt_checks.check_words([f"--config={RECIPE}", "--optimizer=AdamW"])
    litgpt_checks.check_words(['--config={"seed": 1}', '--optimizer={"class_path": "x"}'])
    litgpt_checks.check_words(["--config=nowhere.yaml", '--optimizer={"class_path": "x"}'])


class Chunks:
    """As litgpt's LitData."""

    def __init__(self, data_path, split_names=("train", "val")):
        self.data_path, self.split_names = data_path, split_names


def test_data_that_is_not_there(tmp_path):
    samples = write_instructions(tmp_path / "instructions.json", 4)
    litgpt_checks.check_data(JSON(samples, val_split_fraction=0.5))
    with pytest.raises(ValueError, match="`json_path`: no samples to validate on"):
        litgpt_checks.check_data(JSON(samples, val_split_fraction=0.0))
    samples.write_text("[]")
    with pytest.raises(ValueError, match="`json_path`: no samples to train on in .*instructions.json"):
        litgpt_checks.check_data(JSON(samples, val_split_fraction=0.5))
    samples.write_text('[{"instruction": "a", "output": "b"}, {"instruction": "only"}]')
    with pytest.raises(ValueError, match="has no instruction or no output: {'instruction': 'only'}; give a list of"):
        litgpt_checks.check_data(JSON(samples, val_split_fraction=0.5))
    samples.write_text("[")
    with pytest.raises(ValueError, match="`json_path`: .*instructions.json' is not JSON .*; give a list of"):
        litgpt_checks.check_data(JSON(samples, val_split_fraction=0.5))
    with pytest.raises(ValueError, match="`data_path`: there is no index.json in .*train"):
        litgpt_checks.check_data(Chunks(tmp_path))
    with pytest.raises(ValueError, match="`train_data_path`: 0 .txt files in"):
        litgpt_checks.check_data(TextFiles(tmp_path))
    litgpt_checks.check_data(Chunks("s3://somewhere", None))


def test_a_tokenizer_that_does_not_fit(corpus, tmp_path):
    text, other = write_text(tmp_path / "text", corpus), write_tokenizer(tmp_path / "other")
    small = {"model_name": "x", "model_config": Config(**MODEL | {"vocab_size": 99, "padded_vocab_size": 99})}
    given = {"model_name": "pythia-14m", "data": PreparedText(text)}
    litgpt_checks.check(given | {"tokenizer_dir": text})
    with pytest.raises(ValueError, match="`tokenizer_dir`: PreparedText needs a tokenizer"):
        litgpt_checks.check(given)
    with pytest.raises(ValueError, match="was|were made with, but got 'other'"):
        litgpt_checks.check(given | {"tokenizer_dir": other})
    with pytest.raises(
        ValueError, match="a vocabulary of 300 tokens does not fit into the model's `padded_vocab_size` of 99"
    ):
        litgpt_checks.check(small | {"tokenizer_dir": text, "data": PreparedText(text)})


def test_a_checkpoint_with_more_than_weights(tmp_path):
    """litgpt reads those of a training in some places only."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    weights = torch.load(folder / "lit_model.pth")
    torch.save({"model": weights, "step_count": 3}, folder / "lit_model.pth")
    litgpt_checks.check({"checkpoint_dir": folder, "devices": 1})
    message = "holds the whole state .* write litgpt convert_pretrained_checkpoint"
    with pytest.raises(ValueError, match=message):
        litgpt_checks.check({"checkpoint_dir": folder, "devices": 2})
    with pytest.raises(ValueError, match=message):
        litgpt_checks.check({"model_name": "x", "model_config": Config(**MODEL), "initial_checkpoint_dir": folder})


def test_what_litgpt_would_download_is_left_to_it():
    litgpt_checks.check({"checkpoint_dir": Path("EleutherAI/pythia-14m")})
    with pytest.raises(FileNotFoundError, match="'EleutherAI/pythia-14n' does not exist"):
        litgpt_checks.check({"checkpoint_dir": Path("EleutherAI/pythia-14n")})


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


@pytest.mark.parametrize("outcome", [None, RuntimeError("stopped"), SystemExit(2)])
def test_litgpt_is_as_before_after_a_call(monkeypatch, outcome):
    pytest.importorskip("requests", reason="litgpt's command line needs it")
    litgpt = importlib.import_module("litgpt.__main__")
    seen = []

    def main():
        seen.append((L.Fabric, sys.argv[1:], litgpt.PARSER_DATA["pretrain"]))
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(litgpt, "main", main)
    before = L.Fabric, list(sys.argv), dict(litgpt.PARSER_DATA), litgpt.CLI
    with contextlib.nullcontext() if outcome is None else pytest.raises(type(outcome)):
        litgpt_command.run(["pretrain", "--help"])
    assert (L.Fabric, sys.argv, litgpt.PARSER_DATA, litgpt.CLI) == before
    [(fabric, words, command)] = seen
    assert fabric is litgpt_command.ReportingFabric and words == ["pretrain", "--help"] and command is not pretrain
