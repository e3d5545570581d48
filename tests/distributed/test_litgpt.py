"""litgpt's own command line on two processes, under its FSDP1: the plain model's roles, and one device's weights.

On two GPUs this is ``litgpt`` itself; on a CPU, where Lightning refuses FSDP1, run_litgpt.py.
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from finetuning import write_instructions
from litgpt_commands import (
    FINETUNE,
    PRETRAIN,
    assert_as_plain,
    optimizer,
    prepared,
    run_litgpt,
    write_checkpoint,
    write_text,
)
from reporting import REPORT
from texts import write_corpus

pytest.importorskip("requests", reason="litgpt's command line needs it")

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
SETTINGS = {"lr": 1e-2, "rank": 3, "update_proj_gap": 4, "second_moment": "block"}
ADAMW = optimizer("torch.optim.AdamW", lr=1e-2)
REPORTING = optimizer("reporting.ReportingAdaPM", **SETTINGS)


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])],
)
def on(request):
    return request.param


@pytest.fixture(scope="module")
def workplace(on, tmp_path_factory):
    folder = tmp_path_factory.mktemp(on)
    write_text(folder / "text", write_corpus(folder / "corpus", files=24))
    write_checkpoint(folder / "checkpoint")
    write_instructions(folder / "instructions.json", 32)
    return folder


def litgpt(on, folder, devices, *words, **variables):
    on_cpu = on == "cpu"
    module = str(Path(__file__).with_name("run_litgpt.py")) if on_cpu and devices > 1 else "litgpt"
    if not on_cpu:
        variables["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")
    return run_litgpt(folder, *words, f"--devices={devices}", module=module, **variables)


def pretrain(on, folder, devices, out, *words, **variables):
    """Eight steps of two batches of four windows; the learning rate depends on the number of batches, too."""
    start = ["pretrain", "tiny", *prepared("text"), *PRETRAIN, f"--out_dir={out}"]
    start += ["--train.max_tokens=2048", "--train.lr_warmup_steps=2", f"--train.micro_batch_size={4 // devices}"]
    return litgpt(on, folder, devices, *start, *words, **variables)


def weights(folder, step="final"):
    return torch.load(folder / step / "lit_model.pth", map_location="cpu")["model"]


def apart(found, expected, start):
    """How far two trained models are apart, relative to how far training has moved each weight; the most."""
    assert found.keys() == expected.keys() == start.keys()
    distances = [(found[name] - expected[name]).norm() / (expected[name] - start[name]).norm() for name in start]
    print(distances)
    return max(distances)


def test_pretraining_with_tied_embeddings(on, workplace):
    """litgpt builds the model without memory, and FSDP1 then fills both: what was tied may not be so any more."""
    file = workplace / "tied.json"
    pretrain(on, workplace, 2, "out/tied", REPORTING, "--train.tie_embeddings=true", **{REPORT: file})
    trained = weights(workplace / "out" / "tied")
    tied = torch.equal(trained["lm_head.weight"], trained["transformer.wte.weight"])
    for rank in ("", "1"):
        assert len(assert_as_plain(Path(f"{file}{rank}"), "pretrain", SETTINGS, tied)) == 8


def test_finetuning_has_the_plain_models_roles(on, workplace):
    file = workplace / "finetune.json"
    words = ["finetune_full", "checkpoint", "--data=JSON", "--data.json_path=instructions.json", *FINETUNE, REPORTING]
    words += ["--out_dir=out/finetune", "--train.max_steps=3", "--train.lr_warmup_steps=2", "--train.epochs=2"]
    litgpt(on, workplace, 2, *words, **{REPORT: file})
    for rank in ("", "1"):
        assert len(assert_as_plain(Path(f"{file}{rank}"), "finetune_full", SETTINGS)) == 3


@pytest.mark.parametrize("chosen", [ADAMW, REPORTING], ids=["AdamW", "AdaPM"])
def test_pretraining_equals_one_device_and_resumes(on, workplace, chosen):
    """AdamW shows what litgpt, the data and the sums of two devices leave apart."""
    out = workplace / "out" / ("adamw" if chosen is ADAMW else "adapm")
    words = [chosen, "--initial_checkpoint_dir=checkpoint", "--train.save_interval=4"]
    pretrain(on, workplace, 1, out / "one", *words, **{REPORT: f"{out}-one"})
    pretrain(on, workplace, 2, out / "two", *words, **{REPORT: f"{out}-two"})
    if chosen is REPORTING:
        for file in ("one", "two", "two1"):
            assert len(assert_as_plain(Path(f"{out}-{file}"), "pretrain", SETTINGS)) == 8
    start = torch.load(workplace / "checkpoint" / "lit_model.pth")
    assert apart(weights(out / "two"), weights(out / "one"), start) < 0.02
    shutil.copytree(out / "two", out / "resumed")
    for step in ("step-00000008", "final"):
        (out / "resumed" / step / "lit_model.pth").unlink()
    words.remove("--initial_checkpoint_dir=checkpoint")  # litgpt takes it or --resume
    resumed = pretrain(on, workplace, 2, out / "resumed", *words, "--resume=auto", **{REPORT: f"{out}-resumed"})
    assert "Resuming training from" in resumed.stdout
    assert apart(weights(out / "resumed"), weights(out / "two"), start) < 1e-3
