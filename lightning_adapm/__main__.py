"""The command ``lightning-adapm``, also ``python -m lightning_adapm``."""

from __future__ import annotations

import importlib
import inspect
import linecache
import re
import sys
import traceback

from lightning_adapm.commands import LITGPT_COMMANDS

USAGE = """\
usage: lightning-adapm {plan,prepare,fit,validate,test,predict,litgpt} [--config FILE ...] [--OPTION VALUE ...]

  plan       what the optimizer's state will cost:  lightning-adapm plan --model_name Llama-3-8B
  prepare    a tokenizer, tokens and instructions from text on this machine, for litgpt's commands
  fit        train a model:  lightning-adapm fit --config recipes/trainer/pretrain/quickstart.yaml
  validate   one pass over the validation data
  test       one pass over the test data
  predict    predictions for every batch
  litgpt     litgpt's pretrain and finetune_*, with our figures in its logs:  lightning-adapm litgpt pretrain -h

Several --config files apply in order, options after them override. All options of one command:
  lightning-adapm fit -h
  lightning-adapm fit --model.help lightning_adapm.litgpt.LitGPTModule
"""


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The words after the command's name; ``None`` for those of this process.
    """
    words = sys.argv[1:] if args is None else args
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    try:
        # after the help, which need not wait for Lightning
        if words[0] == "plan":
            from lightning_adapm.commands import plan as plan_command

            sys.exit(plan_command.run(words[1:]))
        if words[0] == "prepare":
            from lightning_adapm.commands import prepare as prepare_command

            prepare_command.run(words[1:])
            return
        if words[0] == "litgpt" or words[0] in LITGPT_COMMANDS:
            from lightning_adapm.commands import litgpt as litgpt_command

            litgpt_command.run(words[1:] if words[0] == "litgpt" else words)
            _leave_process_group()
            return
        from lightning_adapm.trainer.cli import AdaPMCLI

        AdaPMCLI(args)
        _leave_process_group()
    except Exception as error:
        if not _is_message_to_the_user(error):
            raise
        sys.exit(f"lightning-adapm: error: {_reason(error)}")


def _leave_process_group() -> None:
    """gloo's threads now and then abort a process that ends without this, after all its work is done."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _reason(error: Exception) -> str:
    """What the error says; of the parser's list of the types that a value does not have, only what a class refused."""
    text = str(error)
    if "Union subtypes" not in text:
        return " ".join(text.split()) if text.startswith("Parser key") else text
    refusals = [line for line in re.findall(r"^ +- (.*)$", text, re.MULTILINE) if not line.startswith("Expected a ")]
    refused = re.findall(r"^( +)- Problem with given class_path '(.+)':\n((?:\1 +.*\n?)+)", text, re.MULTILINE)
    if len(refusals) != 1:
        return text
    if not refused:
        return refusals[0]
    [(_, class_path, details)] = refused
    return f"{class_path}: {' '.join(details.split()).removeprefix('Validation failed: ')}{_hint(class_path, details)}"


def _hint(class_path: str, details: str) -> str:
    """What a misspelt argument of a class may have been."""
    unexpected = re.search(r"Key '(\w+)' is not expected", details)
    module, _, name = class_path.rpartition(".")
    if unexpected is None:
        return ""
    from lightning_adapm.optim.options import instead_of

    known = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return f"; {instead_of(unexpected[1], known)}"


def _is_message_to_the_user(error: Exception) -> bool:
    """Whether this package or the parser refused some input by a ``raise``: a traceback would bury what it says."""
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    package = frame.f_globals.get("__name__", "").split(".")[0]
    statement = linecache.getline(frame.f_code.co_filename, line).strip()
    return package in ("lightning_adapm", "jsonargparse") and statement.startswith("raise")


if __name__ == "__main__":
    main()
