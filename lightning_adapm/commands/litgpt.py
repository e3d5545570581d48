"""``lightning-adapm litgpt pretrain ...``: litgpt's own commands, with AdaPM's table and figures in their logs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning as L
from torch.optim import Optimizer

from lightning_adapm.commands import LITGPT_COMMANDS
from lightning_adapm.litgpt.checks import check, check_words
from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.trainer.callbacks.monitors import Monitored, pooled_residual, pooled_state
from lightning_adapm.trainer.callbacks.pooling import ResidualFigures
from lightning_adapm.trainer.callbacks.run import StepClock
from lightning_adapm.trainer.callbacks.summary import print_summary
from lightning_adapm.trainer.errors import CommandParser
from lightning_adapm.trainer.recipes import with_files

EVERY_N_STEPS = 50
"""Optimizer steps between two measurements, as the callbacks' default."""


def run(words: list[str]) -> None:
    """Run one of litgpt's training commands.

    Args:
        words: The command and its arguments, as litgpt's command line expects them.

    Raises:
        ValueError: There is no such command, or litgpt would fail later or ignore an argument.
        ModuleNotFoundError: litgpt is not installed, or a package that its command line needs.
    """
    if not words or words[0] not in LITGPT_COMMANDS:
        found = f"but got {words[0]!r}" if words else "but got none"
        raise ValueError(f"lightning-adapm litgpt runs one of litgpt's commands {', '.join(LITGPT_COMMANDS)}, {found}")
    words = with_files(words, "litgpt")
    try:
        litgpt = importlib.import_module("litgpt.__main__")
        importlib.import_module("requests")  # which its parser imports late, and does not require
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"litgpt's command line needs {error.name}: pip install 'lightning-adapm[litgpt]'"
        ) from error
    check_words(words)
    with _reporting(litgpt, words):
        litgpt.main()


@contextlib.contextmanager
def _reporting(litgpt: Any, words: list[str]) -> Iterator[None]:
    """Replace litgpt's Fabric, its commands, its parser and ``sys.argv`` for the time of a call, and restore them."""
    commands, parse, fabric, argv = dict(litgpt.PARSER_DATA), litgpt.CLI, L.Fabric, list(sys.argv)
    try:
        litgpt.PARSER_DATA.update({name: _checked(commands[name]) for name in LITGPT_COMMANDS})
        litgpt.CLI = functools.partial(parse, parser_class=CommandParser)
        L.Fabric = ReportingFabric  # type: ignore[misc]  # litgpt looks it up when it starts
        sys.argv[1:] = words  # litgpt reads them there, more than once
        yield
    finally:
        litgpt.PARSER_DATA.update(commands)
        litgpt.CLI = parse
        L.Fabric = fabric  # type: ignore[misc]
        sys.argv[:] = argv


class ReportingFabric(L.Fabric):
    """Fabric that prints AdaPM's table, and adds figures to the logged metrics.

    The figures are those of ``OptimizerStateMonitor`` and ``ResidualNormMonitor``, under the same names. They are
    measured in the first step and then in every 50th, and logged with the next training loss.
    """

    def setup_optimizers(self, *optimizers: Optimizer) -> Any:
        """Set up optimizers, print their tables, and measure their steps from now on."""
        self._reports = [OptimizerReport(self, optimizer) for optimizer in optimizers]
        if self.is_global_zero:
            print_summary(optimizers)
        return super().setup_optimizers(*optimizers)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log metrics; add the figures measured since the last training loss."""
        figures: dict[str, float] = {}
        for report in self._reports if "loss" in metrics else ():
            figures |= report.take()
        super().log_dict({**metrics, **figures}, step=step)


class OptimizerReport:
    """Measurements of an optimizer in the first step and in every 50th.

    Args:
        fabric: Fabric of this process.
        optimizer: Any optimizer; only :class:`AdaPM` has residuals to measure.
    """

    def __init__(self, fabric: L.Fabric, optimizer: Optimizer) -> None:
        self._fabric, self._steps, self._figures = fabric, 0, dict[str, float]()
        self._monitored: Monitored | None = None
        if isinstance(optimizer, RoleOptimizer) and ResidualFigures(optimizer).layers:
            self._monitored = Monitored(optimizer, "residual/", StepClock(EVERY_N_STEPS))
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def take(self) -> dict[str, float]:
        """Return the figures measured since the last call."""
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
    """Wrap a command of litgpt so that it checks its arguments before any work."""

    @functools.wraps(setup)
    def checked(*args: Any, **kwargs: Any) -> None:
        arguments = inspect.signature(setup).bind(*args, **kwargs)
        arguments.apply_defaults()
        check(arguments.arguments)
        setup(*args, **kwargs)

    return checked
