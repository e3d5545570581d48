"""Shared parts of the callbacks: the steps that log, and the files of a run."""

import functools
import importlib.util
import io
import posixpath
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import lightning as L
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class StepClock:
    """Choice of the optimizer steps that log: the first at or after each multiple of ``every_n_steps``, from 0.

    With several optimizers, a multiple can be a step of another one; then the next step logs.

    Args:
        every_n_steps: Steps between two that log.
        step: First step of this run. A resumed run logs at the same steps as an uninterrupted one.
    """

    def __init__(self, every_n_steps: int, step: int = 0) -> None:
        self._every = every_n_steps
        self._last = (step - 1) // every_n_steps

    def rings(self, step: int) -> bool:
        """Whether step number ``step`` logs; true once for each multiple."""
        last, self._last = self._last, max(self._last, step // self._every)
        return self._last > last


def check_every_n_steps(every_n_steps: int) -> int:
    """Check and return ``every_n_steps``.

    Raises:
        MisconfigurationException: The value is not an int >= 1.
    """
    if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
        raise MisconfigurationException(f"every_n_steps must be an int >= 1, but got {every_n_steps!r}")
    return every_n_steps


def logged_step(trainer: L.Trainer) -> int:
    """Step under which Lightning logs a training batch's metrics, whatever the number of optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_figures(trainer: L.Trainer, figures: Mapping[str, float]) -> None:
    """Send figures to every logger at once; ``pl_module.log`` drops them where ``log_every_n_steps`` skips a step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(figures), step=logged_step(trainer))


def optimizer_name(trainer: L.Trainer) -> str:
    """Class names of the Trainer's optimizers, for messages."""
    return " + ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "no optimizer"


def run_folder(trainer: L.Trainer) -> str:
    """Folder of this run's files. Call it on every process, because Lightning broadcasts the name."""
    return str(trainer.log_dir or trainer.default_root_dir)


def write_file(folder: str, name: str, content: bytes) -> None:
    """Write a file into a local or remote folder, created if necessary.

    A full disk or a folder that cannot be written is a warning, because no training should end for a figure.
    """
    path = posixpath.join(folder, name)
    files = get_filesystem(folder)
    try:
        files.makedirs(folder, exist_ok=True)
        with files.open(path, "wb") as file:
            file.write(content)
    except OSError as error:
        rank_zero_warn(f"{path} is not written: {error}")


def publish_figure(trainer: L.Trainer, folder: str, name: str, draw: Callable[[], "Figure"]) -> None:
    """Save a figure as ``name.png`` in the run's folder and show it in TensorBoard, if matplotlib is installed.

    The first process draws. The folder's name is asked for by the caller, which every process must do, while a process
    may have nothing to draw.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if importlib.util.find_spec("matplotlib") is None:
        _say_no_matplotlib()
        return
    figure = draw()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_file(folder, f"{name}.png", image.getvalue())
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, global_step=logged_step(trainer))


def publish_text(trainer: L.Trainer, name: str, text: str) -> None:
    """Show a text in Markdown in TensorBoard, from the first process."""
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, text, global_step=logged_step(trainer))


@functools.cache
def _say_no_matplotlib() -> None:
    rank_zero_info("No figures of the optimizer: matplotlib is not installed (pip install 'lightning-adapm[plot]')")
