"""The choice of text files on this machine, and their split into training and validation."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import BinaryIO, Literal

# Folders of installed packages, tests, and tables or word lists, which are neither prose nor code.
STDLIB_EXCLUDE = (
    "site-packages dist-packages test tests idlelib idle_test lib2to3 turtledemo encodings pydoc_data __pycache__"
).split()

_NEAR = 2**16
"""Bytes around a position in which a word ends, if words have ends."""
_CONTINUATION = bytes(range(0x80, 0xC0))
"""Bytes of UTF-8 that no character begins with."""

PARTS: tuple[Literal["train", "val"], ...] = ("train", "val")


@dataclass(frozen=True)
class Document:
    """One text: its file, its name in the corpus, its first byte, its size in bytes, and the file's mtime in ns."""

    path: Path
    name: str
    start: int
    size: int
    mtime_ns: int

    def text(self) -> str | None:
        """Read the text; None where it is not UTF-8."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            data = file.read(self.size)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None


@dataclass(frozen=True)
class Corpus:
    """Documents for training and documents for validation, in order."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]

    def digest(self) -> str:
        """Hexadecimal digest of the files' names, sizes and mtimes, and of the split."""
        digest = hashlib.sha256()
        for part in (self.train, self.val):
            for doc in part:
                line = f"{doc.name}\0{doc.start}\0{doc.size}\0{doc.mtime_ns}\0"
                digest.update(line.encode(errors="surrogateescape"))
            digest.update(b"\1")
        return digest.hexdigest()

    def texts(self, part: Literal["train", "val"], left_out: list[str] | None = None) -> Iterator[str]:
        """Read the texts of one part. Files that are not UTF-8 are skipped, and their names added to ``left_out``."""
        for doc in self.train if part == "train" else self.val:
            if (text := doc.text()) is not None:
                yield text
            elif left_out is not None:
                left_out.append(doc.name)


def find_corpus(
    path: str | Path | None,
    pattern: str,
    exclude: Sequence[str] | None,
    val_fraction: float,
    max_bytes: int | None,
) -> Corpus:
    """Find documents and split them by file; the result depends on the files' names and sizes alone.

    Args:
        path: A folder, where each file is a document, or one file, whose last part is for validation. ``None`` for the
            sources of Python's standard library.
        pattern: Pattern of the files at any depth below the folder, as in ``pathlib.PurePath.match``.
        exclude: Names of folders to skip at any depth. ``None`` skips none, or in the standard library its tests,
            installed packages and tables.
        val_fraction: Share of the files for validation.
        max_bytes: Maximum amount of text, in bytes, from a uniform choice of files. ``None`` for no limit.

    Raises:
        ValueError: The path does not exist, the pattern is empty, or fewer than two non-empty files match.
    """
    root = Path(sysconfig.get_paths()["stdlib"] if path is None else path).expanduser()
    if root.is_file():
        train, val = _split_file(root, val_fraction, max_bytes)
        return Corpus((train,), (val,))
    if not root.is_dir():
        raise ValueError(f"`path`: there is no {str(root)!r}; give a text file, or a folder with at least two of them")
    skipped = set(STDLIB_EXCLUDE if path is None and exclude is None else exclude or ())
    if not pattern:
        raise ValueError("`pattern` is empty; write '*' for every file")
    documents = list(_documents(root, pattern, skipped))
    if len(documents) < 2:
        raise ValueError(
            f"`pattern`: {len(documents)} non-empty files below {str(root)!r} match {pattern!r}, but two are"
            " needed, one to train on and one to validate on; give another `path` or `pattern`"
        )
    # Hashing the names, not shuffling, keeps every file in its place when others come or go.
    documents.sort(key=lambda doc: _unit_hash("order", doc.name))
    if max_bytes is not None:
        documents = _within(documents, max_bytes)
    val_documents = {doc for doc in documents if _unit_hash("split", doc.name) < val_fraction}
    if not val_documents or len(val_documents) == len(documents):
        # With few files, the split by hash can leave one side empty.
        ranked = sorted(documents, key=lambda doc: _unit_hash("split", doc.name))
        val_documents = set(ranked[: min(max(1, round(val_fraction * len(ranked))), len(ranked) - 1)])
    return Corpus(
        tuple(doc for doc in documents if doc not in val_documents),
        tuple(doc for doc in documents if doc in val_documents),
    )


def _documents(root: Path, pattern: str, skipped: set[str]) -> Iterator[Document]:
    """Yield the non-empty files that match, without entering skipped folders, of which site-packages are large."""
    pattern = pattern.removeprefix("**/")  # for PurePath.match, which looks at any depth, one folder
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if PurePath(relative).match(pattern) and path.is_file():
                stat = path.stat()
                if stat.st_size:
                    yield Document(path, relative, 0, stat.st_size, stat.st_mtime_ns)


def _split_file(path: Path, val_fraction: float, max_bytes: int | None) -> tuple[Document, Document]:
    """Cut one file at the end of a line, or of a word in a line of megabytes, into training and validation parts.

    Raises:
        ValueError: One of the parts would be empty.
    """
    stat = path.stat()
    with path.open("rb") as file:
        end = _end_of_line(file, min(stat.st_size, max_bytes or stat.st_size))
        cut = _end_of_line(file, int(end * (1 - val_fraction)))
        if cut == end:  # in the last line
            cut = _end_of_word(file, int(end * (1 - val_fraction)))
    if not 0 < cut < end:
        raise ValueError(
            f"`path`: the {end} bytes of {str(path)!r} cannot be cut into training and validation text"
            f" (`val_fraction`: {val_fraction}); give a longer file, or a folder with several"
        )
    return (
        Document(path, path.name, 0, cut, stat.st_mtime_ns),
        Document(path, path.name, cut, end - cut, stat.st_mtime_ns),
    )


def _end_of_line(file: BinaryIO, position: int) -> int:
    """Position after the line that holds a position; after its next word where the line goes on for a megabyte."""
    file.seek(position)
    line = file.readline(2**20)
    return position + len(line) if len(line) < 2**20 else _end_of_word(file, position)


def _end_of_word(file: BinaryIO, position: int) -> int:
    """Position after the word that holds a position, with one space; after its character where words have no spaces
    between them, as in Chinese and Japanese.
    """
    start = max(0, position - _NEAR)
    file.seek(start)
    before, ahead = file.read(position - start), file.read(_NEAR)
    if space := re.search(rb"\s", ahead):
        return position + space.end()
    if len(ahead) < _NEAR and re.search(rb"\s", before):
        return position + len(ahead)  # of the file's last word
    return position + len(ahead) - len(ahead.lstrip(_CONTINUATION))


def _unit_hash(salt: str, name: str) -> float:
    digest = hashlib.sha256(f"{salt}:{name}".encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _within(documents: list[Document], max_bytes: int) -> list[Document]:
    """Keep the documents that fit into ``max_bytes``, in order, skipping those that are too large."""
    total, kept = 0, []
    for doc in documents:
        if total + doc.size <= max_bytes:
            total += doc.size
            kept.append(doc)
    if len(kept) < 2:
        raise ValueError(f"`max_bytes`: {len(kept)} files fit into {max_bytes} bytes; give room for at least two")
    return kept
