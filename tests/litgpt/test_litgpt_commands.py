"""litgpt's commands take AdaPM by ``--optimizer``: what it then does is what it does with the plain model."""

import shutil

import pytest
import torch
from finetuning import write_instructions
from litgpt_commands import (
    FINETUNE,
    LORA,
    PRETRAIN,
    assert_as_plain,
    optimizer,
    run_litgpt,
    text_files,
    write_checkpoint,
)
from reporting import REPORT

pytest.importorskip("requests", reason="litgpt's command line needs it")
pytest.importorskip("litdata", reason="TextFiles needs it")

SETTINGS = {"lr": 3e-3, "rank": 3, "momentum": {"value": "low_rank"}, "second_moment": "block"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("litgpt")
    write_checkpoint(folder / "checkpoint")
    write_instructions(folder / "instructions.json", 16)
    return folder


def finetune(folder, command, *words, **variables):
    data = ["--data=JSON", f"--data.json_path={folder / 'instructions.json'}"]
    out = f"--out_dir=out/{command}"
    return run_litgpt(folder, command, "checkpoint", *data, *FINETUNE, out, *words, **variables)


def pretrain(folder, corpus, out, *words, **variables):
    start = ["pretrain", "pythia-14m", *text_files(corpus), *PRETRAIN]
    return run_litgpt(folder, *start, "--tokenizer_dir=checkpoint", f"--out_dir={out}", *words, **variables)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["finetune_full", "finetune_lora", "finetune_adapter_v2"])
def test_finetuning_has_the_plain_models_roles(workplace, command):
    file = workplace / f"{command}.json"
    words = [optimizer("reporting.ReportingAdaPM", **SETTINGS), "--train.max_steps=3", "--train.lr_warmup_steps=2"]
    words += ["--train.epochs=2"]
    if command == "finetune_lora":
        words += [f"--{name}={str(value).lower()}" for name, value in LORA.items()]
    finetune(workplace, command, *words, **{REPORT: file})
    rates = assert_as_plain(file, command, SETTINGS)
    assert len(rates) == 3
    assert rates[1] == pytest.approx(SETTINGS["lr"] / 2)  # of the warm-up


@pytest.mark.slow
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_pretraining_has_the_plain_models_roles(workplace, corpus, tie_embeddings):
    file = workplace / f"pretrain-{tie_embeddings}.json"
    words = [optimizer("reporting.ReportingAdaPM", **SETTINGS), "--train.max_tokens=768", "--train.lr_warmup_steps=1"]
    words += [f"--train.tie_embeddings={str(tie_embeddings).lower()}", "--train.min_lr=1e-3"]
    pretrain(workplace, corpus, f"out/pretrain-{tie_embeddings}", *words, **{REPORT: file})
    rates = assert_as_plain(file, "pretrain", SETTINGS, tie_embeddings)
    assert len(rates) == 3
    assert max(rates) <= SETTINGS["lr"]
    assert rates[-1] > 1e-3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_pretraining_has_the_plain_models_roles(workplace, corpus):
    """As litgpt runs where nothing is disabled: the model is within what ``torch.compile`` puts around it."""
    file = workplace / "compiled.json"
    words = [optimizer("reporting.ReportingAdaPM", **SETTINGS), "--train.max_tokens=512", "--train.lr_warmup_steps=1"]
    pretrain(workplace, corpus, "out/compiled", *words, **{REPORT: file, "TORCHDYNAMO_DISABLE": "0"})
    assert len(assert_as_plain(file, "pretrain", SETTINGS)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen", [optimizer("torch.optim.AdamW", lr=3e-3), optimizer("lightning_adapm.AdaPM", lr=3e-3, rank=3)]
)
def test_resumed_equals_uninterrupted(workplace, corpus, chosen):
    """Where AdamW resumes to the same weights, so does AdaPM: the first is tested here, too."""
    name = "adamw" if "AdamW" in chosen else "adapm"
    words = [chosen, "--train.max_tokens=2048", "--train.save_interval=4", "--train.lr_warmup_steps=2"]
    whole, parts = workplace / "out" / f"{name}-whole", workplace / "out" / f"{name}-parts"
    pretrain(workplace, corpus, whole, *words)
    pretrain(workplace, corpus, parts, *words)
    for path in ("step-00000008", "final"):
        (parts / path / "lit_model.pth").unlink()
    assert "Resuming training from" in pretrain(workplace, corpus, parts, *words, "--resume=auto").stdout
    before, after = (torch.load(folder / "final" / "lit_model.pth")["model"] for folder in (whole, parts))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
