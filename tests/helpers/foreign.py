"""A project that knows nothing of this package, and ways to run it."""

import csv
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from commands import HELPERS, REPOSITORY
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from models import PlainLM, token_batches
from torch.utils.data import DataLoader


class Foreign(L.LightningModule):
    """A project that chooses its optimizer itself."""

    def __init__(self, optimizer=torch.optim.AdamW, **options):
        super().__init__()
        self.net, self.make = PlainLM(), lambda m: optimizer(m.named_parameters(), lr=3e-3, **options)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]))

    def configure_optimizers(self):
        return self.make(self)

    def train_dataloader(self):
        return DataLoader(token_batches(12), batch_size=1)

    def val_dataloader(self):
        return DataLoader(token_batches(2, seed=5), batch_size=1)


def fit(tmp_path, module, callbacks, **options):
    loggers = [CSVLogger(tmp_path, "csv"), TensorBoardLogger(tmp_path, "tb")]
    trainer = L.Trainer(
        **({"max_steps": 12, "logger": loggers, "callbacks": callbacks} | options),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module)
    return trainer


def logged(trainer, key):
    rows = list(csv.DictReader((Path(trainer.log_dir) / "metrics.csv").open()))
    return {int(row["step"]): float(row[key]) for row in rows if row.get(key)}


CLI_PROJECT = """
import lightning as L, torch
from lightning.pytorch.cli import LightningCLI
from foreign import Foreign

class Project(Foreign):
    def __init__(self):
        super().__init__()
    configure_optimizers = L.LightningModule.configure_optimizers

LightningCLI(Project, save_config_callback=None)
"""

CLI_CONFIG = """
trainer:
  max_steps: 6
  accelerator: cpu
  enable_progress_bar: false
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}
  callbacks:
    - {class_path: lightning_adapm.OptimizerStateMonitor, init_args: {every_n_steps: 2}}
    - {class_path: lightning_adapm.ResidualNormMonitor, init_args: {every_n_steps: 2}}
    - {class_path: lightning_adapm.ClosingTable}
optimizer: {class_path: lightning_adapm.AdaPM, init_args: {lr: 1.0e-3, rank: 2, momentum: {mlp: full, query: low_rank}}}
"""


def run_script(tmp_path, source, *arguments):
    (tmp_path / "script.py").write_text(source)
    path = f"{HELPERS}:{REPOSITORY}"
    return subprocess.run(
        [sys.executable, "script.py", *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
