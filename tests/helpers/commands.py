"""The command line as a user runs it, on data and sizes for tests."""

import csv
import os
from pathlib import Path

from forked import PATHS, completed

HELPERS = Path(__file__).parent
REPOSITORY = HELPERS.parents[1]
RECIPES = REPOSITORY / "recipes"
QUICKSTART = RECIPES / "trainer" / "pretrain" / "quickstart.yaml"
QUICKSTART_ADAMW = RECIPES / "trainer" / "pretrain" / "quickstart-adamw.yaml"


def shrunk(corpus, folder, steps=4):
    """Options that turn a recipe for TextDataModule and LitGPTModule into seconds of work on ``corpus``."""
    return [
        f"--trainer.max_steps={steps}",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=1",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        f"--data.init_args.path={corpus}",
        "--data.init_args.pattern=*.txt",
        f"--data.init_args.cache_dir={folder / 'cache'}",
        "--data.init_args.val_fraction=0.2",
        "--data.init_args.vocab_size=300",
        "--data.init_args.block_size=16",
        "--data.init_args.batch_size=4",
        "--model.init_args.config.n_layer=2",
        "--model.init_args.config.vocab_size=300",
        "--model.init_args.config.block_size=16",
    ]


def run(folder, *words, check=True):
    """``python -m lightning_adapm`` with these words, started in ``folder``."""
    paths = [PATHS[0], *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    result = completed(["lightning_adapm", *words], folder, env, timeout=240)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}\n{result.stdout}\n{result.stderr}")
    return result


def logged(run_folder, column):
    """The values of one column of a CSVLogger's table, in order, as strings."""
    with (run_folder / "metrics.csv").open() as file:
        return [row[column] for row in csv.DictReader(file) if row.get(column)]
