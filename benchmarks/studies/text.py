"""The text that benchmarks train on: bytes, so that a tokenizer is needed nowhere."""

import hashlib
import json
import lzma
import platform
import random
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NO_TARGET = 256
"""Added to a byte that is read but not to be predicted."""


@dataclass(frozen=True)
class Text:
    """Bytes to train on and others to validate on, uint8, or int16 where some are :data:`NO_TARGET`; ``name`` tells
    texts apart. ``starts``: where windows of the two may begin; None for anywhere.
    """

    name: str
    train: Tensor
    val: Tensor
    starts: tuple[Tensor, Tensor] | None = None


def read_text(path: Path | None = None) -> Text:
    """The text file ``path`` (``.xz`` is unpacked), its last twentieth kept for validation; without a path the sources
    of Python's standard library, 40 of 400 files kept for validation. Of ``.jsonl`` the answers alone are targets.

    Raises:
        ValueError: The file is empty, or a line of ``.jsonl`` lacks question or answer.
    """
    if path is None:
        return named(f"Python {platform.python_version()} sources", *standard_library())
    raw = read_bytes(path)
    if ".jsonl" in path.suffixes:
        return instructions(path, raw, lambda text: as_tensor(text.encode()).to(torch.int16))
    cut = len(raw) - len(raw) // 20
    if cut == len(raw):
        raise ValueError(f"--data {path}: holds {len(raw)} bytes; name a text file of some megabytes")
    return named(path.name, raw[:cut], raw[cut:])


def read_bytes(path: Path) -> bytes:
    """Content of a file, unpacked where its name ends in ``.xz``."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def instructions(path: Path, raw: bytes, encode: Callable[[str], Tensor], no_target: int = NO_TARGET) -> Text:
    """Lines ``{"question": ..., "answer": ...}``, one after the other; windows begin with a question.

    Args:
        encode: Function from a text to its numbers.
        no_target: Added to those of questions.
    """
    parts: list[list[Tensor]] = [[], []]
    lines = raw.splitlines()
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            prompt, answer = (encode(record[key] + end) for key, end in (("question", "\n"), ("answer", "\n\n")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f'--data {path}: line {number + 1} is not {{"question": "...", "answer": "..."}}, but {line[:60]!r}'
            ) from error
        parts[number >= len(lines) - len(lines) // 20].append(torch.cat([prompt + no_target, answer]))
    if not all(parts):
        raise ValueError(f"--data {path}: holds {len(lines)} lines; give it 20 or more")
    starts = [torch.tensor([0, *map(len, part[:-1])]).cumsum(0) for part in parts]
    digest = hashlib.sha256(raw).hexdigest()[:8]
    name = f"{path.name} ({len(lines)} questions, {digest})"
    return Text(name, torch.cat(parts[0]), torch.cat(parts[1]), (starts[0], starts[1]))


def standard_library() -> tuple[bytes, bytes]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(
        f for f in root.rglob("*.py") if not {"site-packages", "dist-packages", "test", "tests"} & set(f.parts)
    )
    random.Random(0).shuffle(files)
    train, val = (b"\n".join(f.read_bytes() for f in part) for part in (files[40:400], files[:40]))
    return train, val


def named(source: str, train: bytes, val: bytes) -> Text:
    digest = hashlib.sha256(train + val).hexdigest()[:8]
    return Text(f"{source} ({len(train) / 1e6:.1f} MB, {digest})", as_tensor(train), as_tensor(val))


def as_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
