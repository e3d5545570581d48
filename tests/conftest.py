"""Settings and fixtures of the whole suite."""

import gc
import os

# Tiny models gain nothing from threads and lose much where cores are shared; the commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Compiled loops round otherwise than torch: only their own tests take them, as plain Python unless this is 0.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

import pytest
import torch

# Before anything imports Triton: its kernels are then run by an interpreter where no device runs them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from texts import write_corpus


def pytest_collection_modifyitems(items):
    """Begin with what may take longest, which would otherwise be left to one worker while the others have ended."""

    def seconds(item):
        marker = item.get_closest_marker("timeout")
        return marker.args[0] if marker else 0

    items.sort(key=seconds, reverse=True)


def pytest_collection_finish():
    """Keep what the imports made out of the search for live modules, which every optimizer from bare tensors makes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")
