"""Early checks for mistakes that litgpt reports late or ignores."""

from __future__ import annotations

import importlib
import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_adapm.litgpt import model as litgpt_model
from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.optim.options import instead_of, options_of

_SAMPLES = 'a list of {"instruction", "input", "output"}'
_EXAMPLE = '{"class_path": "lightning_adapm.AdaPM", "init_args": {"lr": 1e-3}}'


def check_words(words: Sequence[str]) -> None:
    """Check a command line for ways to choose an optimizer that litgpt's parser ignores or fails on.

    Raises:
        ValueError: The parser would ignore the optimizer or fail, or a file's does not exist.
    """
    names = [word.partition("=")[0] for word in words]
    for name in names:
        if name.startswith("--optimizer."):
            raise ValueError(
                f"{name}: litgpt's parser does not put an optimizer together from parts; write it whole, as"
                f" --optimizer='{_EXAMPLE}'"
            )
    given = [word.partition("=")[2] or following for word, following in zip(words, [*words[1:], ""], strict=True)]
    options = list(zip(names, given, strict=True))
    in_files = [found for name, value in options if name == "--config" and (found := _optimizer_in(value)) is not None]
    for found in in_files:
        if "class_path" in found:
            _class_of(found["class_path"])  # the parser fails on it where an earlier file has another class
    if in_files and any(name == "--optimizer" and value.lstrip().startswith("{") for name, value in options):
        raise ValueError(
            "--optimizer: litgpt's parser fails where a configuration file has an optimizer; write"
            f""" --config='{{"optimizer": {_EXAMPLE}}}' after the file"""
        )


def _optimizer_in(config: str) -> dict[str, Any] | None:
    """The optimizer in the value of ``--config``, a file or YAML itself; the parser reports all else."""
    try:
        path = Path(config)
        read = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else config)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    found = read.get("optimizer") if isinstance(read, dict) else None
    return found if isinstance(found, dict) else None


def check(arguments: Mapping[str, Any]) -> None:
    """Check the arguments of one of litgpt's commands.

    Raises:
        ValueError: A model, an optimizer, one of its options, data or a GPU does not exist, a checkpoint is of
            another model, or ``out_dir`` cannot be written.
        FileNotFoundError: A folder lacks its checkpoint or its tokenizer, or there is nothing to resume from.
    """
    from litgpt.utils import parse_devices

    devices = parse_devices(arguments.get("devices", 1))
    check_optimizer(arguments.get("optimizer"))
    _check_weights(arguments, devices)
    check_data(_data_of(arguments))
    _check_devices(devices)
    _check_resume(arguments.get("resume", False), arguments.get("out_dir"))
    if arguments.get("out_dir") is not None:
        check_writable(Path(arguments["out_dir"]))


def check_writable(folder: Path) -> None:
    """Make the folder ``out_dir``, and check that files can be written there.

    Raises:
        ValueError: They cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"`out_dir`: cannot write to {str(folder)!r} ({error}); give another folder") from error


def _data_of(arguments: Mapping[str, Any]) -> Any:
    """The data of a command; without any, `litgpt pretrain` reads TinyLlama's."""
    if arguments.get("data") is None and arguments.get("model_name", "list") != "list":
        from litgpt.data import TinyLlama

        return TinyLlama()
    return arguments.get("data")


def _check_weights(arguments: Mapping[str, Any], devices: int) -> None:
    """Check the model, and that the weights and the tokenizer that training starts from fit it."""
    if arguments.get("checkpoint_dir") is not None:
        folder = _found(arguments["checkpoint_dir"])
        if not folder.exists() and _can_be_downloaded(str(arguments["checkpoint_dir"])):
            return  # litgpt downloads it
        litgpt_model.check_weights(litgpt_model.litgpt_config(None, None, str(folder)), str(folder))
        litgpt_model.check_tokenizer(folder)
        if devices > 1 or "lora_r" in arguments:  # LoRA's are merged at the end
            litgpt_model.check_raw(folder)
    if "model_name" not in arguments or arguments["model_name"] == "list":
        return
    config = arguments.get("model_config") or litgpt_model.litgpt_config(arguments["model_name"])
    _check_pretraining_tokens(arguments, config)
    if arguments.get("initial_checkpoint_dir") is not None:
        folder = _found(arguments["initial_checkpoint_dir"])
        litgpt_model.check_weights(config, str(folder))
        litgpt_model.check_raw(folder)


def _check_devices(devices: int) -> None:
    """Check that there are as many GPUs as litgpt shards over."""
    count = torch.cuda.device_count()
    if devices > max(1, count):
        raise ValueError(
            f"`devices`: litgpt shards over GPUs, and this machine has {count} instead of {devices}; write"
            f" --devices={max(1, count)}"
        )


def _check_resume(resume: bool | str | Path, folder: Path | None) -> None:
    """Check that there is a checkpoint to resume from; litgpt looks for it when it has built the model."""
    if resume is True and folder is not None and not any(Path(folder).rglob("step-*/*.pth")):
        raise FileNotFoundError(
            f"`resume`: there is no checkpoint step-*/*.pth in {str(folder)!r}; give the `out_dir` of the run, or write"
            " --resume=auto, which begins anew without one"
        )
    if isinstance(resume, Path) and not resume.exists():
        raise FileNotFoundError(
            f"`resume`: {str(resume)!r} does not exist; give a checkpoint such as OUT_DIR/step-00000100/lit_model.pth,"
            " or true for the last one in `out_dir`, or auto"
        )


def _check_pretraining_tokens(arguments: Mapping[str, Any], config: Any) -> None:
    """Check that data which needs a tokenizer gets one, and that its vocabulary fits into the model."""
    data: Any = arguments.get("data")
    if arguments.get("tokenizer_dir") is None:
        if hasattr(data, "tokenizer"):
            raise ValueError(
                f"`tokenizer_dir`: {type(data).__name__} needs a tokenizer; give a folder with tokenizer.json and"
                " tokenizer_config.json"
            )
        return
    tokenizer = litgpt_model.load_tokenizer(str(_found(arguments["tokenizer_dir"])))
    if tokenizer.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"`tokenizer_dir`: a vocabulary of {tokenizer.vocab_size} tokens does not fit into the model's"
            f" `padded_vocab_size` of {config.padded_vocab_size}; give the model's tokenizer or another model_config"
        )
    if hasattr(data, "connect_tokenizer"):  # PreparedText, whose tokens are those of one tokenizer
        data.connect_tokenizer(tokenizer)


def check_data(data: Any) -> None:
    """Check that litgpt's data modules find their files; litgpt itself reports that late, or by a bare assertion.

    Raises:
        ValueError: There are too few files or samples.
    """
    if hasattr(data, "train_data_path"):
        _check_text_files(data)
    elif hasattr(data, "required_paths"):
        _check_prepared_folders(data)
    elif hasattr(data, "json_path"):
        _check_instructions(data)
    elif hasattr(data, "split_names"):
        _check_chunks(data)


def _check_prepared_folders(data: Any) -> None:
    """Check the folders of ``TinyLlama`` and ``MicroLlama``, which `litgpt pretrain` reads where no data is given."""
    for folder in data.required_paths:
        if "://" not in folder and not Path(folder).is_dir():
            raise ValueError(
                f"`data`: {type(data).__name__} reads prepared text, and there is no folder {folder!r}; give other"
                " data, such as --data TextFiles --data.train_data_path FOLDER, or the `data_path` of the prepared text"
            )


def _check_text_files(data: Any) -> None:
    found = len(list(Path(data.train_data_path).glob("*.txt")))
    least = 1 if data.val_data_path is not None else 2
    if found < least:
        raise ValueError(
            f"`train_data_path`: {found} .txt files in {str(data.train_data_path)!r}; give a folder with at least"
            f" {least}, of which the first validates where there is no `val_data_path`"
        )


def _check_instructions(data: Any) -> None:
    """Check the samples of ``JSON``, split as litgpt splits them."""
    try:
        splits = data.get_splits()
    except json.JSONDecodeError as error:
        raise ValueError(f"`json_path`: {str(data.json_path)!r} is not JSON ({error}); give {_SAMPLES}") from error
    for part, samples in zip(("train", "validate"), splits, strict=True):
        if not len(samples):
            raise ValueError(
                f"`json_path`: no samples to {part} on in {str(data.json_path)!r}; give"
                f" {_SAMPLES}, and a `val_split_fraction` that leaves some for both parts"
            )
        for sample in samples:
            if not (isinstance(sample, dict) and {"instruction", "output"} <= sample.keys()):
                raise ValueError(
                    f"`json_path`: a sample of {str(data.json_path)!r} has no instruction or no output:"
                    f" {str(sample)[:80]}; give {_SAMPLES}"
                )


def _check_chunks(data: Any) -> None:
    """Check the chunks of ``LitData`` that are on this machine."""
    if "://" in str(data.data_path):
        return
    for name in data.split_names or ("",):
        folder = Path(data.data_path, name)
        if not (folder / "index.json").is_file():
            raise ValueError(
                f"`data_path`: there is no index.json in {str(folder)!r}; prepare the text with litdata, or give"
                " another `data_path` or `split_names`"
            )


def _found(folder: Path) -> Path:
    """Find a folder as litgpt does, as it is or below ``checkpoints``."""
    from litgpt.utils import extend_checkpoint_dir

    return Path(extend_checkpoint_dir(folder))


def _can_be_downloaded(name: str) -> bool:
    from litgpt.config import configs

    return any(name == f"{config['hf_config']['org']}/{config['hf_config']['name']}" for config in configs)


def check_optimizer(optimizer: str | Mapping[str, Any] | None) -> None:
    """Check that an optimizer exists and accepts its options.

    Raises:
        ValueError: There is no such class or option, or it refuses a value.
    """
    if optimizer is None:
        return
    if isinstance(optimizer, str):
        optimizer = {"class_path": optimizer if "." in optimizer else f"torch.optim.{optimizer}", "init_args": {}}
    if not {"class_path", "init_args"} <= optimizer.keys():
        raise ValueError(
            f"optimizer: litgpt needs class_path and init_args, but got {dict(optimizer)}; write optimizer: {_EXAMPLE}"
        )
    found = _class_of(optimizer["class_path"])
    ours = isinstance(found, type) and issubclass(found, RoleOptimizer)
    known = options_of(found)
    if len(known) < len(inspect.signature(found).parameters) and not ours:
        return  # any keyword may have a meaning
    for option in optimizer["init_args"]:
        if option not in known:
            raise ValueError(f"optimizer: {found.__name__} has no option {option!r}; {instead_of(option, known)}")
    if ours:  # building one checks the values
        found([{"params": [torch.zeros(1, requires_grad=True)], "role": "norm"}], **optimizer["init_args"])


def _class_of(path: Any) -> Any:
    """The class of an optimizer."""
    module, _, name = str(path).rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError, ValueError):
        raise ValueError(f"optimizer: there is no class {path!r}; write optimizer: {_EXAMPLE}") from None
