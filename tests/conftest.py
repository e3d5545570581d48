"""Settings and fixtures of the whole suite."""

import os

# Tiny models gain nothing from threads and lose much where cores are shared; the commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random

import pytest
import torch

# Before anything imports Triton: its kernels are then run by an interpreter where no device runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORDS = "the a of to in matrix vector rank step loss weight learns moves stays small large slowly again never".split()


def write_corpus(folder, files=12, words=400, seed=0):
    """Text files of a few hundred short words each, always the same."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        lines = [" ".join(generator.choices(WORDS, k=8)) for _ in range(words // 8)]
        (folder / f"document_{index}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")
