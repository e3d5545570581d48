"""litgpt's own command line as a user runs it, on models, text and tokenizers for tests."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from commands import REPOSITORY
from finetuning import CONFIG, write_tokenizer
from litgpt import GPT, Config

MODEL = CONFIG | {"block_size": 512}  # an Alpaca prompt in a vocabulary of 300
"""Fields of a litgpt model of seconds."""

PRETRAIN = [
    *(f"--model_config.{name}={value}" for name, value in MODEL.items()),
    "--precision=32-true",
    "--devices=1",
    "--logger_name=csv",
    "--train.micro_batch_size=4",
    "--train.global_batch_size=8",
    "--train.max_seq_length=32",
    "--train.log_interval=1",
    "--eval.max_iters=2",
    "--data.num_workers=0",
]
"""Options that shrink any pretraining with ``TextFiles``."""

FINETUNE = [
    "--precision=32-true",
    "--devices=1",
    "--logger_name=csv",
    "--train.micro_batch_size=2",
    "--train.global_batch_size=4",
    "--train.log_interval=1",
    "--eval.max_iters=2",
    "--eval.max_new_tokens=2",
    "--data.num_workers=0",
    "--data.val_split_fraction=0.25",
]
"""Options that shrink any finetuning with ``JSON``."""


def run_litgpt(folder, *words, module="litgpt", check=True, **variables):
    """``python -m MODULE`` with these words, started in ``folder``, without compiling."""
    paths = [str(REPOSITORY), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=folder,
        env=os.environ | settings | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if check and result.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}\n{result.stdout}\n{result.stderr}")
    return result


def optimizer(class_path, **init_args):
    """The option that chooses an optimizer, in the form that litgpt's parser reads whole."""
    return f"--optimizer={json.dumps({'class_path': class_path, 'init_args': init_args})}"


def write_checkpoint(folder):
    """A litgpt checkpoint directory with random weights and a tokenizer."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    config = Config(**MODEL)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return folder
