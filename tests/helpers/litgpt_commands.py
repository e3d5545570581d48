"""litgpt's own command line as a user runs it, on models, text and tokenizers for tests."""

import dataclasses
import json
import os

import torch
import yaml
from commands import HELPERS, REPOSITORY
from finetuning import CONFIG, write_tokenizer
from forked import READ_ON_IMPORT, completed
from litgpt import GPT, Config, adapter_v2, lora
from reporting import ReportingAdaPM, describe

from lightning_adapm.commands.prepare import prepare

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
]
"""Options that shrink any pretraining."""

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


def run_litgpt(folder, *words, module="litgpt", check=True, stdin=None, **variables):
    """``python -m MODULE``, or a file, with these words, started in ``folder``, without compiling."""
    ours = REPOSITORY, HELPERS, HELPERS.parent / "distributed"
    paths = [*map(str, ours), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"PYTHONPATH": os.pathsep.join(paths), "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # which asks the package index
    env = os.environ | settings | {name: str(value) for name, value in variables.items()}
    fresh = any(name.startswith(READ_ON_IMPORT) for name in variables)
    result = completed([module, *words], folder, env, timeout=280, fresh=fresh, stdin=stdin)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}\n{result.stdout}\n{result.stderr}")
    return result


def optimizer(class_path, **init_args):
    """The option that chooses an optimizer, in the form that litgpt's parser reads whole."""
    return f"--optimizer={json.dumps({'class_path': class_path, 'init_args': init_args})}"


def optimizer_config(class_path, **init_args):
    """The option that replaces the optimizer of a configuration file."""
    return f"--config={json.dumps({'optimizer': {'class_path': class_path, 'init_args': init_args}})}"


def text_files(corpus):
    """The options for litgpt's own data module, which needs litdata."""
    return ["--data=TextFiles", f"--data.train_data_path={corpus}", "--data.num_workers=0"]


def prepared(text):
    """The options for text of :func:`write_text`."""
    return ["--data=lightning_adapm.litgpt.data.PreparedText", f"--data.path={text}", f"--tokenizer_dir={text}"]


def write_text(folder, corpus):
    """Tokenizer and tokens as ``lightning-adapm prepare`` makes them of text files."""
    prepare(str(folder), str(corpus), "*.txt", val_fraction=0.2, vocab_size=300, cache_dir=str(folder / "cache"))
    return folder


def write_checkpoint(folder):
    """A litgpt checkpoint directory with random weights and a tokenizer."""
    write_tokenizer(folder)
    torch.manual_seed(0)
    config = Config(**MODEL)
    torch.save(GPT(config).state_dict(), folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    return folder


LORA = {"lora_r": 4, "lora_key": True, "lora_projection": True, "lora_mlp": True, "lora_head": True}


def plain(command):
    """The model that a command trains, without what the command wraps around it."""
    if command == "finetune_lora":
        model = lora.GPT(lora.Config(**MODEL, **LORA, lora_query=True, lora_value=True))
        lora.mark_only_lora_as_trainable(model)
    elif command == "finetune_adapter_v2":
        model = adapter_v2.GPT(adapter_v2.Config(**MODEL))
        adapter_v2.mark_only_adapter_v2_as_trainable(model)
    else:
        model = GPT(Config(**MODEL))
    return model


def assert_as_plain(file, command, settings, tie_embeddings=False):
    """See that a ``ReportingAdaPM`` reported what it would do with the plain model; the rates of its steps."""
    report, model = json.loads(file.read_text()), plain(command)
    if tie_embeddings:
        model.transformer.wte.weight = model.lm_head.weight
    expected = describe(ReportingAdaPM(model.named_parameters(), **settings))
    assert report["roles"] == expected
    assert expected.keys() == {name for name, param in model.named_parameters() if param.requires_grad}
    return report["lr"]
