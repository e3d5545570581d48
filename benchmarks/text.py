"""The text that benchmarks train on: bytes, so that a tokenizer is needed nowhere."""

import hashlib
import lzma
import platform
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """Bytes to train on and others to validate on, uint8; ``name`` tells texts apart."""

    name: str
    train: Tensor
    val: Tensor


def read_text(path: Path | None = None) -> Text:
    """The text file ``path`` (``.xz`` is unpacked), its last twentieth kept for validation; without a path the sources
    of Python's standard library, 40 of 400 files kept for validation.

    Raises:
        ValueError: an empty file.
    """
    if path is None:
        return named(f"Python {platform.python_version()} sources", *standard_library())
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    cut = len(raw) - len(raw) // 20
    if cut == len(raw):
        raise ValueError(f"--data {path}: holds {len(raw)} bytes; name a text file of some megabytes")
    return named(path.name, raw[:cut], raw[cut:])


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
    name = f"{source} ({len(train) / 1e6:.1f} MB, {digest})"
    return Text(name, *(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in (train, val)))
