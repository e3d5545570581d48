"""litgpt's recipes as a user runs them, shrunk by options only; each starts from what the one before has written."""

import csv

import pytest
import torch
from commands import RECIPES
from litgpt_commands import FINETUNE, optimizer_config, run_litgpt

pytest.importorskip("requests", reason="litgpt's command line needs it")
pytestmark = pytest.mark.slow

LITGPT = RECIPES / "litgpt"
SMALL = [
    "--model_config.n_layer=2",
    "--model_config.n_embd=48",
    "--model_config.intermediate_size=96",
    "--train.global_batch_size=8",
    "--train.micro_batch_size=4",
    "--train.max_seq_length=64",
    "--train.max_tokens=40960",  # 80 steps
    "--train.save_interval=40",
    "--train.lr_warmup_steps=5",
    "--train.log_interval=1",
    "--eval.max_iters=4",
]
PRETRAINED, FINETUNED = "out/quickstart/pretrain/final", "out/quickstart/finetune/final"
LORA_DATA = "--data.json_path=data/quickstart/instructions/train.json"
QUESTION = "What does this Python function do?\ndef read_text(path, encoding=None):"


def losses(folder):
    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines) if row.get("loss")]


def falls(folder, least):
    found = losses(folder)
    count = max(1, len(found) // 8)
    return sum(found[-count:]) / count < sum(found[:count]) / count - least


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the quick start's data and its model, pretrained by its recipe."""
    folder = tmp_path_factory.mktemp("quickstart")
    few = ["--max_bytes=600000", "--vocab_size=512", "--cache_dir=cache", "--val_fraction=0.2"]
    printed = run_litgpt(folder, "prepare", *few, module="lightning_adapm").stdout
    assert "data/quickstart/tokenizer.json: 512" in printed
    assert "data/quickstart/instructions/train.json: " in printed
    run_litgpt(folder, "pretrain", "--config", LITGPT / "pretrain" / "quickstart.yaml", *SMALL)
    assert falls(folder / "out" / "quickstart" / "pretrain", 1.0)
    return folder


def test_adamw_twin_differs_in_the_optimizer_only(workplace):
    twin = optimizer_config("torch.optim.AdamW", lr=1e-3, weight_decay=0.1)
    words = ["litgpt", "pretrain", "--config", LITGPT / "pretrain" / "quickstart.yaml", *SMALL, twin]
    short = ["--train.max_tokens=10240", "--out_dir=out/adamw"]  # 20 steps
    run_litgpt(workplace, *words, *short, module="lightning_adapm")
    assert falls(workplace / "out" / "adamw", 0.2)
    first = losses(workplace / "out" / "adamw")[:2], losses(workplace / "out" / "quickstart" / "pretrain")[:2]
    assert first[0] == first[1]  # the learning rate of the first step is 0


def test_resumed_equals_uninterrupted(workplace):
    whole = torch.load(workplace / PRETRAINED / "lit_model.pth")
    for step in ("step-00000080", "final"):
        (workplace / "out" / "quickstart" / "pretrain" / step / "lit_model.pth").unlink()
    words = ["pretrain", "--config", LITGPT / "pretrain" / "quickstart.yaml", *SMALL, "--resume=auto"]
    assert "Resuming training from" in run_litgpt(workplace, *words).stdout
    again = torch.load(workplace / PRETRAINED / "lit_model.pth")
    assert again["step_count"] == whole["step_count"] == 80
    assert all(torch.equal(value, again["model"][name]) for name, value in whole["model"].items())


@pytest.fixture(scope="module")
def finetuned(workplace):
    words = ["litgpt", "finetune_full", "--config", LITGPT / "finetune" / "quickstart.yaml", "--train.max_steps=30"]
    words += ["--train.micro_batch_size=4", "--train.lr_warmup_steps=3", "--eval.max_iters=2"]
    run_litgpt(workplace, *words, module="lightning_adapm")
    return workplace


def test_finetuning_from_it(finetuned):
    assert falls(finetuned / "out" / "quickstart" / "finetune", 0.1)
    said = run_litgpt(finetuned, "generate", FINETUNED, f"--prompt={QUESTION}", "--max_new_tokens=8").stdout
    assert QUESTION in said
    assert "### Response:" in said


def test_chatting_with_it(finetuned):
    result = run_litgpt(
        finetuned, "chat", FINETUNED, "--max_new_tokens=8", stdin="What does open do?\nAnd close?\n\n"
    ).stdout
    assert "Now chatting with quickstart" in result
    assert result.count(">> Reply: ") == 2


def test_lora_from_it(workplace):
    start = ["finetune_lora", "--config", LITGPT / "finetune" / "llama-3-8b-lora.yaml"]
    refused = run_litgpt(
        workplace, "litgpt", *start, PRETRAINED, *FINETUNE, LORA_DATA, module="lightning_adapm", check=False
    )
    assert refused.returncode and "write litgpt convert_pretrained_checkpoint" in refused.stderr.splitlines()[-1]
    run_litgpt(workplace, "convert_pretrained_checkpoint", PRETRAINED, "weights")
    words = [*start, "weights"]
    words += [*FINETUNE, LORA_DATA, "--train.max_steps=40"]
    words += ["--train.lr_warmup_steps=2", "--train.max_seq_length=160", "--eval.final_validation=false"]
    run_litgpt(workplace, *words, optimizer_config("lightning_adapm.AdaPM", lr=1e-2))
    assert falls(workplace / "out" / "finetune" / "llama-3-8b-lora", 0.1)
    final = "out/finetune/llama-3-8b-lora/final"
    assert QUESTION in run_litgpt(workplace, "generate", final, f"--prompt={QUESTION}", "--max_new_tokens=4").stdout
