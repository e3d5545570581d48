"""The command ``lightning-adapm``, also ``python -m lightning_adapm``."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback

from lightning_adapm import __version__
from lightning_adapm.commands import COMMANDS, LITGPT_COMMANDS, check_command

TRACEBACK = "LIGHTNING_ADAPM_TRACEBACK"
"""Environment variable that shows the traceback of every error when it is 1."""

_INPUT_ERRORS = (argparse.ArgumentError, ValueError, TypeError, NotImplementedError, ModuleNotFoundError, OSError)
"""Types of the errors that this package and the parser raise about input."""
_HELP = (["-h"], ["--help"])
_READ_INPUT = ("lightning_adapm", "jsonargparse")
_READS_DEVICES = "lightning.pytorch.trainer.connectors.accelerator_connector"
"""The module of the Trainer's that reads its accelerator, devices, strategy and precision."""

_WRITE_MODEL = (
    "Give --config recipe:NAME (`lightning-adapm recipes` lists them), --config FILE with `model: {class_path: ...,"
    " init_args: ...}`, or --model CLASS"
)

USAGE = f"""\
usage: lightning-adapm {{{",".join(COMMANDS)}}} [--config FILE ...] [--OPTION VALUE ...]

  recipes    names of the complete configurations that come with this package
  plan       bytes of optimizer state before training:  lightning-adapm plan --model_name Llama-3-8B
  prepare    a tokenizer, tokens and instructions for litgpt's commands, from text on this machine
  fit        train a model:  lightning-adapm fit --config recipe:pretrain/quickstart
  validate   one pass over the validation data
  test       one pass over the test data
  predict    predictions for every batch
  litgpt     litgpt's pretrain and finetune_*, with AdaPM's figures in its logs:  lightning-adapm litgpt pretrain -h

FILE is a path or recipe:NAME. Several --config files apply in order, and options after them override.
--version prints the version. LIGHTNING_ADAPM_TRACEBACK=1 shows the traceback of every error.
All options of one command:
  lightning-adapm fit -h
  lightning-adapm fit --model.help lightning_adapm.litgpt.LitGPTModule
"""


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The words after the command's name; ``None`` for those of this process.

    Raises:
        SystemExit: With one line about an error that the input explains; every other error keeps its traceback.
    """
    words = sys.argv[1:] if args is None else args
    if not words or words[:1] in _HELP or (words[0] == "litgpt" and words[1:2] in _HELP):
        print(USAGE, end="")
        return
    if words == ["--version"]:
        print(f"lightning-adapm {__version__}")
        return
    try:
        _run(words[0], words[1:], args)
    except BrokenPipeError:  # of `| head`, which has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left at its end
        sys.exit(1)
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1" or not _is_about_input(error):
            raise
        sys.exit(f"lightning-adapm: error: {_reason(error)} ({TRACEBACK}=1 shows the traceback)")


def _run(command: str, options: list[str], args: list[str] | None) -> None:
    """Run a command, with imports of its own: the help need not wait for Lightning."""
    check_command(command)
    if command == "recipes":
        from lightning_adapm.commands import recipes as recipes_command

        recipes_command.run(options)
    elif command == "plan":
        from lightning_adapm.commands import plan as plan_command

        sys.exit(plan_command.run(options))
    elif command == "prepare":
        from lightning_adapm.commands import prepare as prepare_command

        prepare_command.run(options)
    elif command == "litgpt" or command in LITGPT_COMMANDS:
        from lightning_adapm.commands import litgpt as litgpt_command

        litgpt_command.run(options if command == "litgpt" else [command, *options])
        _leave_process_group()
    else:
        from lightning_adapm.trainer.cli import AdaPMCLI

        AdaPMCLI(args)
        _leave_process_group()


def _leave_process_group() -> None:
    """Destroy the process group; without this, gloo's threads sometimes abort a process whose work is done."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _is_about_input(error: Exception) -> bool:
    """Whether an error is about input: its type is, and so is what the code that raised it does."""
    frame = list(traceback.walk_tb(error.__traceback__))[-1][0]
    module = frame.f_globals.get("__name__", "")
    package, misconfigured = module.partition(".")[0], _misconfigurations()
    if package in _READ_INPUT or module == _READS_DEVICES:
        return isinstance(error, (*_INPUT_ERRORS, *misconfigured))
    return package == "lightning" and isinstance(error, misconfigured)


def _misconfigurations() -> tuple[type[Exception], ...]:
    """Lightning's errors about the options of a run."""
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")  # loaded wherever one of them was raised
    return () if exceptions is None else (exceptions.MisconfigurationException,)


def _reason(error: Exception) -> str:
    """The error's text; where the parser lists all types that a value does not have, only what a class refused."""
    text = str(error)
    if re.search(r'Key "(\w+\.)?model" is required', text):
        return f"which model? {_WRITE_MODEL}"
    if text.startswith("Unexpected config:"):
        return f"a file after --config is empty or not a mapping. {_WRITE_MODEL}"
    if "Union subtypes" not in text:
        return " ".join(text.split()) if text.startswith("Parser key") else text
    found = re.findall(r"^ +- (.*)$", text, re.MULTILINE)
    refusals = [line for line in found if not line.startswith(("Expected a ", "Does not validate against any of"))]
    refused = re.findall(r"^( +)- Problem with given class_path '(.+)':\n((?:\1 +.*\n?)+)", text, re.MULTILINE)
    if len(refusals) != 1:
        return text
    if not refused:
        return refusals[0]
    [(_, class_path, details)] = refused
    return f"{class_path}: {' '.join(details.split()).removeprefix('Validation failed: ')}{_hint(class_path, details)}"


def _hint(class_path: str, details: str) -> str:
    """The argument of a class, or the class of a module, that a misspelled one may stand for."""
    unexpected = re.search(r"Key '(\w+)' is not expected", details)
    missing = "has no attribute" in details
    module, _, name = class_path.rpartition(".")
    if unexpected is None and not missing:
        return ""
    from lightning_adapm.optim.options import instead_of, options_of

    holder = importlib.import_module(module)
    if unexpected is not None:
        return f"; {instead_of(unexpected[1], options_of(getattr(holder, name)))}"
    return f"; {instead_of(name, getattr(holder, '__all__', dir(holder)), 'names')}"


if __name__ == "__main__":
    main()
