"""``lightning-adapm prepare``: tokenizer, tokens and instructions for litgpt's commands, from text on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser

from lightning_adapm.data import TextDataModule
from lightning_adapm.data.corpus import PARTS
from lightning_adapm.data.docstrings import instructions
from lightning_adapm.data.tokens import save_tokenizer

INSTRUCTIONS = "instructions"
_DESCRIPTION = """\
Makes from text files of this machine what litgpt's commands need to pretrain and finetune: a folder with a tokenizer
(--tokenizer_dir), tokens (--data lightning_adapm.litgpt.data.PreparedText), and, from the docstrings of Python sources,
instructions in Alpaca's format (--data JSON). Nothing is downloaded.

  lightning-adapm prepare
  lightning-adapm prepare --path ~/texts --pattern '*.txt' --out_dir data/texts
"""


def run(words: list[str]) -> None:
    """Prepare what the words after ``prepare`` ask for, and say what was written."""
    parser = ArgumentParser(
        prog="lightning-adapm prepare",
        usage="lightning-adapm prepare [options]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # type: ignore[arg-type]
    )
    parser.add_function_arguments(prepare)
    settings = parser.instantiate_classes(parser.parse_args(words))
    for name, count in prepare(**settings.as_dict()).items():
        print(f"{settings.out_dir}/{name}: {count:,}")


def prepare(
    out_dir: str = "data/quickstart",
    path: str | None = None,
    pattern: str = "*.py",
    exclude: list[str] | None = None,
    val_fraction: float = 0.05,
    max_bytes: int | None = 16_000_000,
    vocab_size: int = 4096,
    cache_dir: str | None = None,
) -> Mapping[str, int]:
    """Write a folder with tokenizer, tokens and instructions.

    They are in ``tokenizer.json`` and ``tokenizer_config.json``, ``train.npy`` and ``val.npy``, and, where the text has
    docstrings, ``instructions/train.json`` and ``instructions/val.json``.

    Args:
        out_dir: The folder to write.
        path: A folder, each file a document, or one text file, whose last part validates. ``None`` for the sources of
            Python's standard library.
        pattern: Which files below the folder.
        exclude: Names of folders to leave out at any depth. ``None`` for none, or, for the standard library, for its
            tests, installed packages and tables.
        val_fraction: The share of the files (of one file: of its bytes) that validates; between 0 and 1.
        max_bytes: The most text to use, in bytes; a fixed, evenly spread choice of files. ``None`` for all.
        vocab_size: The largest vocabulary to train; at least 257, the bytes and the end-of-text token.
        cache_dir: Where tokens are kept between runs. ``None`` for ``$XDG_CACHE_HOME/lightning-adapm`` or
            ``~/.cache/lightning-adapm``.

    Returns:
        What was written: the tokens in the vocabulary and in each part, and the instructions in each part, by file.

    Raises:
        ValueError: If an option is out of range or there is too little text.
    """
    data = TextDataModule(path, pattern, exclude, val_fraction, max_bytes, vocab_size, cache_dir=cache_dir)
    data.prepare_data()
    data.setup("validate")
    folder = Path(out_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(data.tokenizer, folder)
    written = {"tokenizer.json": data.vocab_size}
    for part in PARTS:
        tokens = data.tokens(part)
        np.save(folder / f"{part}.npy", tokens)
        written[f"{part}.npy"] = len(tokens)
    pairs = {part: instructions(data.corpus().texts(part)) for part in PARTS}
    for part, samples in pairs.items() if all(pairs.values()) else ():
        name = f"{INSTRUCTIONS}/{part}.json"
        (folder / INSTRUCTIONS).mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(samples, indent=1), encoding="utf-8")
        written[name] = len(samples)
    return written
