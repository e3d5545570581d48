"""``lightning-adapm prepare``: a tokenizer, tokens and instructions for litgpt, from text on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_adapm.data import TextDataModule
from lightning_adapm.data.corpus import PARTS
from lightning_adapm.data.docstrings import instructions
from lightning_adapm.data.tokens import save_tokenizer
from lightning_adapm.trainer.errors import CommandParser

INSTRUCTIONS = "instructions"
_DESCRIPTION = """\
Prepare the data that litgpt's commands need to pretrain and finetune, from text files on this machine. The folder gets
a tokenizer (--tokenizer_dir) and tokens (--data lightning_adapm.litgpt.data.PreparedText). Docstrings of Python sources
become instructions in Alpaca's format (--data JSON). Nothing is downloaded.

  lightning-adapm prepare
  lightning-adapm prepare --path ~/texts --pattern '*.txt' --out_dir data/texts
"""


def run(words: list[str]) -> None:
    """Prepare data as the words after ``prepare`` specify, and print what was written."""
    parser = CommandParser(
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
    """Write a folder with a tokenizer, tokens and instructions.

    The files are ``tokenizer.json``, ``tokenizer_config.json``, ``train.npy`` and ``val.npy``. Where the text has
    docstrings, there are ``instructions/train.json`` and ``instructions/val.json``, too.

    Args:
        out_dir: Folder to write.
        path: A folder, where each file is a document, or one text file, whose last part is for validation. ``None`` for
            the sources of Python's standard library.
        pattern: Pattern of the files below the folder.
        exclude: Names of folders to skip at any depth. ``None`` skips none, or in the standard library its tests,
            installed packages and tables.
        val_fraction: Share of the files for validation, or of the bytes of one file; between 0 and 1.
        max_bytes: Maximum amount of text, in bytes, from a fixed, evenly spread choice of files. ``None`` for all.
        vocab_size: Maximum size of the vocabulary; at least 257, the bytes and the end-of-text token.
        cache_dir: Folder in which tokens are kept between runs. ``None`` for ``$XDG_CACHE_HOME/lightning-adapm`` or
            ``~/.cache/lightning-adapm``.

    Returns:
        Number of tokens or instructions by the file written.

    Raises:
        ValueError: An option is out of range, there is too little text, or the folder cannot be made.
    """
    data = TextDataModule(path, pattern, exclude, val_fraction, max_bytes, vocab_size, cache_dir=cache_dir)
    data.prepare_data()
    data.setup("validate")
    folder = Path(out_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"`out_dir`: cannot write to {out_dir!r} ({error}); give another folder") from error
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
