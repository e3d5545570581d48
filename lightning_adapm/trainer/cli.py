"""``lightning-adapm fit|validate|test|predict``: LightningCLI with the model's schedule and a suitable precision."""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LRSchedulerTypeUnion,
    instantiate_class,
)
from torch.optim import Optimizer

from lightning_adapm.optim.adamw import adamw_state_dict
from lightning_adapm.trainer.errors import nearest_option
from lightning_adapm.trainer.mixin import AdaPMMixin
from lightning_adapm.trainer.recipes import with_files


class RichProgress(RichProgressBar):
    """Lightning's Rich progress bar, for configuration files.

    ``RichProgressBar`` itself cannot be named there, because jsonargparse reads the colors of its default theme, such
    as ``#ffffff``, as YAML comments.

    Args:
        refresh_rate: Number of batches between two redraws.
        leave: Whether the bar of every epoch stays on the screen.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)


class AdaPMCLI(LightningCLI):
    """LightningCLI for any LightningModule and data module, named in the configuration by their class paths.

    It differs from LightningCLI in seven points:

    - An optimizer chosen by ``--optimizer`` without ``--lr_scheduler`` follows the schedule in the model's settings, so
      that AdamW and AdaPM compare on equal terms.
    - Such an optimizer also trains the model under ``ModelParallelStrategy``.
    - The default precision is ``bf16-mixed`` on a CUDA device with bfloat16.
    - A run overwrites the configuration that an earlier run saved in the same folder.
    - ``--config recipe:NAME`` reads a recipe that comes with this package.
    - ``torch.optim.AdamW`` resumes from checkpoints of this package's optimizers.
    - A resumed run has the settings of its own configuration, not those that its checkpoint was trained with.

    Args:
        args: Command-line words; ``None`` for those of this process.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            L.LightningModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            # Without these, a hundred lines of options precede every error.
            parser_kwargs={name: {"usage": f"lightning-adapm {name} [options]"} for name in self.subcommands()},
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser raise errors, which the command line prints in one line, instead of exiting."""
        return super().init_parser(**kwargs, exit_on_error=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, with the names of recipes replaced by their files."""
        try:
            if args is None:
                self.config = parser.parse_args(with_files(sys.argv[1:], "trainer"))
            else:
                super().parse_arguments(parser, with_files(args, "trainer") if isinstance(args, list) else args)
        except argparse.ArgumentError as error:
            raise argparse.ArgumentError(None, str(error) + nearest_option(str(error), parser)) from error

    def _parse_ckpt_path(self) -> None:
        """Keep the configuration as written. Lightning would silently replace the model's settings by those in the
        checkpoint, so that changed settings would have no effect in a resumed run.
        """

    def before_instantiate_classes(self) -> None:
        """Refuse a missing checkpoint, choose a precision if the user has not, and drop a progress bar if unwanted."""
        check_checkpoint(self.config[str(self.subcommand)].get("ckpt_path"))
        trainer = self.config[str(self.subcommand)].trainer
        # the Trainer refuses a bar then
        if trainer.enable_progress_bar is False and isinstance(trainer.callbacks, list):
            trainer.callbacks = [each for each in trainer.callbacks if not each.class_path.endswith(".RichProgress")]
        if trainer.precision is None and trainer.accelerator in ("auto", "gpu", "cuda") and _cuda_has_bf16():
            trainer.precision = "bf16-mixed"

    def before_fit(self) -> None:
        """Let the model know whether it resumes; the Trainer finds the path of "last" and the like only later."""
        path = self.config_init["fit"].ckpt_path
        if isinstance(self.model, AdaPMMixin):
            self.model.resumes = path is not None and Path(path).exists()

    def configure_optimizers(  # type: ignore[override]
        self,
        lightning_module: L.LightningModule,
        optimizer: Optimizer,
        lr_scheduler: LRSchedulerTypeUnion | None = None,
    ) -> Any:
        """Add the model's own schedule to an optimizer without one.

        An optimizer whose parameters were replaced is built again. AdamW gets a hook that loads states of this package.
        """
        held = {param for group in optimizer.param_groups for param in group["params"]}
        if not held.issuperset(lightning_module.parameters()):
            # FSDP replaces parameters, and LightningCLI builds optimizers before any strategy has seen the model
            chosen = self.config_init[str(self.subcommand)]
            optimizer = instantiate_class(lightning_module.parameters(), chosen.optimizer)
            if lr_scheduler is not None:
                lr_scheduler = instantiate_class(optimizer, chosen.lr_scheduler)
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.register_load_state_dict_pre_hook(adamw_state_dict)
        if lr_scheduler is None and isinstance(lightning_module, AdaPMMixin):
            return lightning_module.schedule(optimizer)
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)


def check_checkpoint(path: str | None) -> None:
    """Refuse a file that is missing or incomplete; the Trainer itself looks up URLs, and "best", "last" and the like.

    A checkpoint is a zip file, whose table is at its end, or a folder of ``torch.distributed.checkpoint`` or DeepSpeed.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is incomplete, or a folder is no checkpoint.
    """
    if path is None or "://" in path:
        return
    found = Path(path)
    if found.suffix == ".ckpt" and not found.exists():
        raise FileNotFoundError(
            f"`ckpt_path`: {path!r} does not exist; give a checkpoint such as runs/.../checkpoints/last.ckpt"
        )
    if found.is_file() and not zipfile.is_zipfile(found):
        raise ValueError(
            f"`ckpt_path`: {path!r} of {found.stat().st_size} bytes is no complete checkpoint; give an earlier one"
        )
    if found.is_dir() and not any((found / name).is_file() for name in (".metadata", "latest")):
        files = sorted(found.rglob("*.ckpt"), key=lambda file: -file.stat().st_mtime)
        hint = f"give {str(files[0])!r}" if files else "it holds none, so give another"
        raise ValueError(f"`ckpt_path`: {path!r} is a folder and no checkpoint; {hint}")


def _cuda_has_bf16() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
