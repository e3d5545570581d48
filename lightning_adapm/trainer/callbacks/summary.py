"""The table at the start of a run: what the optimizer's state will be."""

import logging
from collections.abc import Iterable
from typing import Literal

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich import get_console
from torch.optim import Optimizer

from lightning_adapm.optim import AdaPM
from lightning_adapm.report.plan import plan
from lightning_adapm.report.tables import summarise, summary_table
from lightning_adapm.step.parts import shares_basis

_log = logging.getLogger(__name__)


def _sharding_note(optimizer: AdaPM) -> str:
    """What the bytes are of, and where the bases are, if parameters are sharded."""
    for group in optimizer.param_groups:
        layouts = (optimizer.placement(param).layout for param in group["params"])
        sharded = next((layout for layout in layouts if layout is not None and len(layout.spans) > 1), None)
        if sharded is not None:
            where = "shared out" if shares_basis(sharded, group["basis"]) else "on every process"
            return f"Bytes of this process, one of {len(sharded.spans)}; bases of the low-rank momentum: {where}"
    return ""


class OptimizerSummary(L.Callback):
    """Prints AdaPM's plan when a fit starts: parameters, momentum policy, rank, and bytes of state beside AdamW's.

    Says nothing of other optimizers, whose state is not known before the first step.

    Args:
        by: ``"role"`` for a line per role, ``"parameter"`` for a line per parameter (of a fused weight: per piece).
        max_rows: The most lines to print; the last one counts the others.

    Raises:
        MisconfigurationException: An option that is not one of these.
    """

    def __init__(self, by: Literal["role", "parameter"] = "role", max_rows: int = 50) -> None:
        if by not in ("role", "parameter"):
            raise MisconfigurationException(f"by must be 'role' or 'parameter', but got {by!r}")
        if not isinstance(max_rows, int) or max_rows < 1:
            raise MisconfigurationException(f"max_rows must be an int >= 1, but got {max_rows!r}")
        self.by, self.max_rows = by, max_rows

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table of every AdaPM optimizer, on the first process."""
        if trainer.is_global_zero:
            print_summary(trainer.optimizers, self.by, self.max_rows)


def print_summary(
    optimizers: Iterable[Optimizer], by: Literal["role", "parameter"] = "role", max_rows: int = 50
) -> None:
    """What :class:`OptimizerSummary` prints, of every AdaPM optimizer."""
    for optimizer in optimizers:
        if isinstance(optimizer, AdaPM):
            lines, name = summarise(plan(optimizer), by), type(optimizer).__name__
            get_console().print(summary_table(lines, by, max_rows, name))
            if note := _sharding_note(optimizer):
                get_console().print(note)
        else:
            _log.debug("OptimizerSummary: the state of %s is not known before it steps", type(optimizer).__name__)
