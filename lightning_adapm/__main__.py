"""The command ``lightning-adapm``, also ``python -m lightning_adapm``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback

from lightning_adapm import __version__
from lightning_adapm.commands import COMMANDS, LITGPT_COMMANDS, check_command

TRACEBACK = "LIGHTNING_ADAPM_TRACEBACK"
"""Environment variable that shows the traceback of every error when it is 1."""

_INPUT_ERRORS = (argparse.ArgumentError, ValueError, TypeError, NotImplementedError, ModuleNotFoundError, OSError)
"""Types of the errors that this package and the parser raise about input."""
_HELP = (["-h"], ["--help"])
_READ_INPUT = ("lightning_adapm", "jsonargparse", "argparse")
_READS_DEVICES = "lightning.pytorch.trainer.connectors.accelerator_connector"
"""The module of the Trainer's that reads its accelerator, devices, strategy and precision."""
_READS_CHECKPOINTS = "lightning.pytorch.trainer.connectors.checkpoint_connector"
"""The module of the Trainer's that reads `ckpt_path`."""

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
        SystemExit: With one line about an error that the input explains, or with 128 and the number of a signal that
            ended the run. Every other error keeps its traceback.
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
    except KeyboardInterrupt:
        sys.exit(_interrupted(words[0], signal.SIGINT))
    except SystemExit as end:
        if type(end).__name__ == "SIGTERMException":  # Lightning's, with which Python would report success
            sys.exit(_interrupted(words[0], signal.SIGTERM))
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1" or not _is_about_input(error):
            raise
        from lightning_adapm.trainer.errors import one_line

        sys.exit(f"lightning-adapm: error: {one_line(error)} ({TRACEBACK}=1 shows the traceback)")


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


def _interrupted(command: str, number: signal.Signals) -> int:
    """Say that a signal has ended a command, and return the exit status that shells use for that."""
    hint = "; --ckpt_path continues from a checkpoint" if command == "fit" else ""
    print(f"lightning-adapm: interrupted by {number.name}{hint}", file=sys.stderr)
    return 128 + number


def _leave_process_group() -> None:
    """Destroy the process group; without this, gloo's threads sometimes abort a process whose work is done."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _is_about_input(error: Exception) -> bool:
    """Whether an error is about input: its type is, and so is what the code that raised it does."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = modules[-1]
    package, misconfigured = module.partition(".")[0], _misconfigurations()
    if isinstance(error, RuntimeError) and str(error).startswith("Error(s) in loading state_dict"):
        return _READS_CHECKPOINTS in modules  # torch's, about the checkpoint of another model
    if package in _READ_INPUT or module == _READS_DEVICES:
        return isinstance(error, (*_INPUT_ERRORS, *misconfigured))
    return package == "lightning" and isinstance(error, misconfigured)


def _misconfigurations() -> tuple[type[Exception], ...]:
    """Lightning's errors about the options of a run."""
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")  # loaded wherever one of them was raised
    return () if exceptions is None else (exceptions.MisconfigurationException,)


if __name__ == "__main__":
    main()
