"""The table at the start of a run: the bytes of state that the optimizer will hold."""

import logging
from collections.abc import Iterable
from typing import Literal

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.report.plan import plan
from lightning_adapm.report.tables import summarize, summary_table
from lightning_adapm.step.parts import shares_basis

_log = logging.getLogger(__name__)


def _sharding_note(optimizer: RoleOptimizer) -> str:
    """Note on the process of the bytes and the placement of bases; empty without sharded parameters."""
    for group in optimizer.param_groups:
        layouts = (optimizer.parts(param)[0].layout for param in group["params"])
        sharded = next((layout for layout in layouts if layout is not None and len(layout.spans) > 1), None)
        if sharded is not None:
            where = "sharded" if shares_basis(sharded, group["basis"]) else "on every process"
            return f"Bytes of this process, one of {len(sharded.spans)}; bases of the low-rank momentum: {where}"
    return ""


class OptimizerSummary(L.Callback):
    """Print AdaPM's plan when a fit starts: parameters, momentum policy, rank, and bytes of state next to AdamW's.

    Other optimizers have no table, because their state is unknown before the first step.

    Args:
        by: ``"role"`` for a row per role; ``"parameter"`` for a row per parameter, and per piece of a fused weight.
        max_rows: Maximum number of rows; a last row counts the others.

    Raises:
        MisconfigurationException: An option has another value.
    """

    def __init__(self, by: Literal["role", "parameter"] = "role", max_rows: int = 50) -> None:
        if by not in ("role", "parameter"):
            raise MisconfigurationException(f"by must be 'role' or 'parameter', but got {by!r}")
        if not isinstance(max_rows, int) or max_rows < 1:
            raise MisconfigurationException(f"max_rows must be an int >= 1, but got {max_rows!r}")
        self.by, self.max_rows = by, max_rows

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table of every optimizer of the package, on the first process."""
        if trainer.is_global_zero:
            print_summary(trainer.optimizers, self.by, self.max_rows)


def print_summary(
    optimizers: Iterable[Optimizer], by: Literal["role", "parameter"] = "role", max_rows: int = 50
) -> None:
    """Print the table of :class:`OptimizerSummary` for every optimizer of the package."""
    from rich import get_console

    for optimizer in optimizers:
        if isinstance(optimizer, RoleOptimizer):
            lines, name = summarize(plan(optimizer), by), type(optimizer).__name__
            get_console().print(summary_table(lines, by, max_rows, name))
            if note := _sharding_note(optimizer):
                get_console().print(note)
        else:
            _log.debug("OptimizerSummary: the state of %s is not known before it steps", type(optimizer).__name__)
