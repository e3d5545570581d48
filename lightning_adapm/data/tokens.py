"""Token arrays from text: a byte-level BPE trained on the corpus itself, and a cache of the result."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lightning_adapm.data.corpus import PARTS, Corpus

END_OF_TEXT = "<|endoftext|>"

# 256 bytes and the end-of-text token; a smaller vocabulary cannot write every text.
MIN_VOCAB_SIZE = 257

# Increased when the split, the order or the format changes, so that older caches are not read.
_CACHE_FORMAT = 1
_ABANDONED_AFTER_SECONDS = 24 * 3600


def default_cache_dir() -> Path:
    """The folder ``$XDG_CACHE_HOME/lightning-adapm``, or ``~/.cache/lightning-adapm`` without that variable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-adapm"


def cache_folder(corpus: Corpus, vocab_size: int, cache_dir: Path) -> Path:
    """Folder for the tokens of this corpus with a vocabulary of this size, whether it exists or not."""
    settings = f"{_CACHE_FORMAT} {vocab_size} {END_OF_TEXT} {corpus.digest()}"
    return cache_dir / hashlib.sha256(settings.encode()).hexdigest()[:24]


def build_cache(corpus: Corpus, vocab_size: int, cache_dir: Path) -> Path:
    """Tokenize the corpus unless it is cached already.

    The complete folder gets its final name by one rename. A process killed on the way leaves no half-written cache, and
    two processes may work at once.

    Returns:
        The folder with the tokenizer and the token arrays.

    Raises:
        ValueError: No file of one of the two parts is UTF-8 text, or the cache cannot be written.
    """
    final = cache_folder(corpus, vocab_size, cache_dir)
    if final.is_dir():
        return final
    partial = cache_dir / f"partial-{uuid.uuid4().hex}"
    with _writing(cache_dir):
        partial.mkdir(parents=True)
    _remove_abandoned(cache_dir)
    try:
        tokenizer = train_tokenizer(corpus.texts("train"), vocab_size)
        tokenizer.save(str(partial / "tokenizer.json"))
        left_out: list[str] = []
        encoded = {part: _encode(tokenizer, corpus.texts(part, left_out)) for part in PARTS}
        _say_what_is_left_out(list(dict.fromkeys(left_out)), len({doc.path for doc in (*corpus.train, *corpus.val)}))
        for part, tokens in encoded.items():
            if not len(tokens):
                raise ValueError(f"`path`: no file of the {part} part of the text is UTF-8; give UTF-8 text")
            with _writing(cache_dir):
                np.save(partial / f"{part}.npy", tokens)
        try:
            partial.rename(final)
        except OSError:
            if not final.is_dir():  # anything but "another process was first"
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


@contextmanager
def _writing(cache_dir: Path) -> Iterator[None]:
    """Name the option where the folder is read-only or the disk full."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"`cache_dir`: cannot write to {str(cache_dir)!r} ({error}); give another folder") from error


def _say_what_is_left_out(names: list[str], count: int) -> None:
    if names:
        more = ", ..." if len(names) > 3 else ""
        warnings.warn(
            f"{len(names)} of {count} files are not UTF-8 and are left out: {', '.join(names[:3])}{more}. Convert"
            " them, for instance by iconv -f latin1 -t utf-8",
            stacklevel=4,
        )


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Any:
    """Train a byte-level BPE ``tokenizers.Tokenizer`` of at most ``vocab_size`` tokens on ``texts``."""
    tokenizers = import_tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a trained tokenizer into a folder, with the settings that litgpt reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "add_bos_token": False}
    special["tokenizer_class"] = "PreTrainedTokenizerFast"  # litgpt requires this key
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")


def import_tokenizers() -> Any:
    """Import the ``tokenizers`` package.

    Raises:
        ModuleNotFoundError: It is missing. The error names the command that installs it.
    """
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TextDataModule needs the package `tokenizers`: pip install 'lightning-adapm[litgpt]'"
        ) from error
    return tokenizers


def _encode(tokenizer: Any, texts: Iterator[str]) -> np.ndarray:
    """Encode texts into one array, each followed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    parts = [np.array([], dtype)]
    while batch := list(itertools.islice(texts, 256)):  # bounded memory, and work for all cores
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, end], dtype))
    return np.concatenate(parts)


def _remove_abandoned(cache_dir: Path) -> None:
    """Delete unfinished folders of processes that were killed long ago."""
    for folder in cache_dir.glob("partial-*"):
        try:
            if time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # another process removed it
            continue
