"""``lightning-adapm litgpt pretrain ...``: litgpt's own commands, with our figures in their logs and table."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.optim import Optimizer

from lightning_adapm import litgpt_model
from lightning_adapm.__main__ import LITGPT_COMMANDS
from lightning_adapm.callbacks.monitors import Monitored, pooled_residual, pooled_state
from lightning_adapm.callbacks.pooling import ResidualFigures
from lightning_adapm.callbacks.run import StepClock
from lightning_adapm.callbacks.summary import print_summary
from lightning_adapm.optim import AdaPM
from lightning_adapm.optim.options import instead_of

EVERY_N_STEPS = 50
"""Optimizer steps from one measurement to the next, as the callbacks' default."""


def run(words: list[str]) -> None:
    """Run one of litgpt's training commands.

    Args:
        words: The command and its arguments, which are litgpt's own.

    Raises:
        ValueError: No such command; a model, option or folder that litgpt would fail on later, or silently ignore.
        ModuleNotFoundError: litgpt, or what its command line needs, is not installed.
    """
    if not words or words[0] not in LITGPT_COMMANDS:
        found = f"but got {words[0]!r}" if words else "but got none"
        raise ValueError(f"lightning-adapm litgpt takes one of litgpt's commands {', '.join(LITGPT_COMMANDS)}, {found}")
    try:
        litgpt = importlib.import_module("litgpt.__main__")
        importlib.import_module("requests")  # which its parser imports late, and does not require
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"litgpt's command line needs {error.name}: pip install 'lightning-adapm[litgpt]'"
        ) from error
    for name in LITGPT_COMMANDS:
        litgpt.PARSER_DATA[name] = _checked(litgpt.PARSER_DATA[name])
    sys.argv[1:] = words  # litgpt reads them there, more than once
    L.Fabric = ReportingFabric  # type: ignore[misc]  # litgpt looks it up when it starts
    litgpt.main()


class ReportingFabric(L.Fabric):
    """Fabric that prints the table of an :class:`AdaPM` it is given, and adds figures to the metrics that are logged.

    They are those of ``OptimizerStateMonitor`` and ``ResidualNormMonitor`` under the same names, in the row of the
    training loss that follows the step they were measured in: the first one, and every 50th.
    """

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Set them up, print and watch."""
        self._reports = [OptimizerReport(self, optimizer) for optimizer in optimizers]
        if self.is_global_zero:
            print_summary(optimizers)
        return super().setup_optimizers(*optimizers)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log a row, with what was measured since the last one."""
        figures: dict[str, float] = {}
        for report in self._reports if "loss" in metrics else ():
            figures |= report.take()
        super().log_dict({**metrics, **figures}, step=step)


class OptimizerReport:
    """Measures an optimizer in some of its steps.

    Args:
        fabric: Of this process.
        optimizer: Any; only of :class:`AdaPM` there are residuals.
    """

    def __init__(self, fabric: L.Fabric, optimizer: Optimizer) -> None:
        self._fabric, self._steps, self._figures = fabric, 0, dict[str, float]()
        self._monitored: Monitored | None = None
        if isinstance(optimizer, AdaPM) and ResidualFigures(optimizer).layers:
            self._monitored = Monitored(optimizer, "residual/", StepClock(EVERY_N_STEPS))
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def take(self) -> dict[str, float]:
        """What was measured since the last call."""
        taken, self._figures = self._figures, {}
        return taken

    def _before_step(self, *_: Any) -> None:
        if self._monitored is not None and self._steps % EVERY_N_STEPS == 0:
            self._monitored.insert_probe(self._steps)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._steps % EVERY_N_STEPS == 0:
            device = self._fabric.device
            state = pooled_state([optimizer], None, device, self._fabric.world_size)
            self._figures |= {f"optimizer/{name}": value for name, value in state.items()}
            if self._monitored is not None:
                self._monitored.remove_probe()
                residual = pooled_residual(self._monitored, device)
                self._figures |= {self._monitored.prefix + name: value for name, value in residual.items()}
        self._steps += 1


def _checked(setup: Callable[..., None]) -> Callable[..., None]:
    """A command of litgpt's that looks at its arguments before any long work."""

    @functools.wraps(setup)
    def checked(*args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(setup).bind(*args, **kwargs)
        arguments.apply_defaults()
        check(arguments.arguments)
        setup(*args, **kwargs)

    return checked


def check(arguments: Mapping[str, Any]) -> None:
    """Look at the arguments of one of litgpt's commands.

    Raises:
        ValueError: A model, an optimizer, an option of it, or data that there is not; a checkpoint of another model.
        FileNotFoundError: A folder without the checkpoint or the tokenizer that it should have.
    """
    check_optimizer(arguments.get("optimizer"))
    litgpt_model.check_data(arguments.get("data"))
    if arguments.get("tokenizer_dir") is not None:
        litgpt_model.check_tokenizer(_found(arguments["tokenizer_dir"]))
    if arguments.get("checkpoint_dir") is not None:
        folder = _found(arguments["checkpoint_dir"])
        litgpt_model.check_weights(litgpt_model.litgpt_config(None, None, str(folder)), str(folder))
        litgpt_model.check_tokenizer(folder)
    if "model_name" not in arguments or arguments["model_name"] == "list":
        return
    config = arguments.get("model_config") or litgpt_model.litgpt_config(arguments["model_name"])
    if arguments.get("initial_checkpoint_dir") is not None:
        litgpt_model.check_weights(config, str(_found(arguments["initial_checkpoint_dir"])))


def _found(folder: Path) -> Path:
    """As litgpt takes a folder: as it is, or else in ``checkpoints``."""
    from litgpt.utils import extend_checkpoint_dir

    return Path(extend_checkpoint_dir(folder))


def check_optimizer(optimizer: str | Mapping[str, Any] | None) -> None:
    """See that an optimizer can be found and has the options it is given.

    Raises:
        ValueError: Naming what was found, and what to write instead.
    """
    if not isinstance(optimizer, Mapping):
        return
    example = 'optimizer: {"class_path": "lightning_adapm.AdaPM", "init_args": {"lr": 1e-3}}'
    if not {"class_path", "init_args"} <= optimizer.keys():
        raise ValueError(
            f"optimizer: litgpt needs class_path and init_args, but got {dict(optimizer)}; write {example}"
        )
    path, _, name = str(optimizer["class_path"]).rpartition(".")
    try:
        found = getattr(importlib.import_module(path), name)
    except (AttributeError, ImportError, ValueError):
        raise ValueError(f"optimizer: there is no class {optimizer['class_path']!r}; write {example}") from None
    known = inspect.signature(found).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for option in optimizer["init_args"]:
        if option not in known:
            raise ValueError(f"optimizer: {name} has no option {option!r}; {instead_of(option, known)}")
    if isinstance(found, type) and issubclass(found, AdaPM):  # which checks their values when it is built
        found([{"params": [torch.zeros(1, requires_grad=True)], "role": "norm"}], **optimizer["init_args"])
