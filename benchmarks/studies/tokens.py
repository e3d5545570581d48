"""Text as tokens of a byte-level BPE that is trained on it, once: vocabulary and tokens are kept beside the text."""

import hashlib
import itertools
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.text import NO_TARGET, Text, instructions, read_bytes, read_text

TRAINED_ON = 48_000_000
"""Bytes at the beginning of the training text from which the vocabulary is made."""
PIECE = 1 << 16
"""Bytes that are tokenized as one text, up to the end of a line."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text file, of Python's sources without a ``path``, in a vocabulary of at most ``vocab``."""

    path: Path | None
    vocab: int

    def read(self) -> Text:
        """Tokenize the text, unless that was done before.

        The vocabulary is trained on the training part alone, so that nothing of the validation text is in it.

        Raises:
            ValueError: The text is questions and answers, or too short.
        """
        file = self._made()
        train, val = torch.load(file, weights_only=True)
        digest = hashlib.sha256(train.numpy().tobytes() + val.numpy().tobytes()).hexdigest()[:8]
        source = f"Python {platform.python_version()} sources" if self.path is None else self.path.name
        return Text(f"{source} ({len(train) / 1e6:.1f} million of {self.vocab} tokens, {digest})", train, val)

    def tokenizer(self) -> Any:
        """The vocabulary, as a tokenizer of the package ``tokenizers``."""
        from lightning_adapm.data.tokens import import_tokenizers

        return import_tokenizers().Tokenizer.from_file(str(self._made().with_suffix(".json")))

    def _made(self) -> Path:
        """File of the tokens, made together with that of the vocabulary unless both are there."""
        file = self._file()
        vocabulary = file.with_suffix(".json")
        if not (file.exists() and vocabulary.exists()):
            unfinished = [path.with_name(f"{path.name}.{os.getpid()}") for path in (vocabulary, file)]
            tokenizer, tokens = self._tokenized()
            tokenizer.save(str(unfinished[0]))
            torch.save(tokens, unfinished[1])
            for path, final in zip(unfinished, (vocabulary, file), strict=True):
                path.replace(final)  # in one move: several processes may do this at once
        return file

    def _file(self) -> Path:
        """File of the tokens: beside the text, or in the user's cache where that folder cannot be written to."""
        from lightning_adapm.data.tokens import default_cache_dir  # which imports Lightning

        raw = read_text().name.encode() if self.path is None else self.path.read_bytes()
        key = hashlib.sha256(f"{self.vocab} {TRAINED_ON} ".encode() + raw).hexdigest()[:8]
        stem = "python-sources" if self.path is None else self.path.name
        folder = default_cache_dir()
        if self.path is not None and os.access(self.path.parent, os.W_OK):
            folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{stem}.bpe{self.vocab}-{key}.pt"

    def _tokenized(self) -> tuple[Any, tuple[Tensor, Tensor]]:
        """Tokenizer of the training text, and the tokens of both parts."""
        from lightning_adapm.data.tokens import train_tokenizer

        text = read_text(self.path)
        if text.starts is not None:
            raise ValueError(f"--data {self.path}: holds questions and answers; studies on tokens train on plain text")
        train, val = (part.numpy().tobytes() for part in (text.train, text.val))
        tokenizer = train_tokenizer(pieces(train[:TRAINED_ON]), self.vocab)
        return tokenizer, (encode(tokenizer, train, self.vocab), encode(tokenizer, val, self.vocab))


@dataclass(frozen=True)
class Answers:
    """Questions and answers in the vocabulary of another text; the answers alone are targets."""

    path: Path
    vocabulary: Tokens

    def read(self) -> Text:
        """Tokenize the questions and answers.

        Raises:
            ValueError: A line of the file lacks question or answer.
        """
        tokenizer = self.vocabulary.tokenizer()

        def encode(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids, dtype=torch.int32)

        text = instructions(self.path, read_bytes(self.path), encode, max(NO_TARGET, self.vocabulary.vocab))
        return replace(text, name=f"{text.name}, {self.vocabulary.vocab} tokens of {self.vocabulary.read().name}")


def pieces(raw: bytes) -> Iterator[str]:
    """Cut a text at ends of lines."""
    start = 0
    while start < len(raw):
        end = raw.find(b"\n", start + PIECE) + 1 or len(raw)
        yield raw[start:end].decode(errors="replace")
        start = end


def encode(tokenizer: Any, raw: bytes, vocab: int) -> Tensor:
    """Tokens of a text, in the smallest signed integers that hold the vocabulary."""
    dtype = torch.int16 if vocab <= 2**15 else torch.int32
    texts, parts = pieces(raw), [torch.empty(0, dtype=dtype)]
    while batch := list(itertools.islice(texts, 256)):  # bounded memory, and work for all cores
        encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        parts += [torch.tensor(encoding.ids, dtype=dtype) for encoding in encoded]
    return torch.cat(parts)
