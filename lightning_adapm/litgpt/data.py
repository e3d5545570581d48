"""Data for litgpt's own commands that needs neither a download nor litdata; this module imports litgpt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from litgpt.data import DataModule
from litgpt.tokenizer import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_adapm.data.corpus import PARTS
from lightning_adapm.data.loaders import TrainLoader, ValLoader


@dataclass
class PreparedText(DataModule):
    """Pretraining windows from the folder that ``lightning-adapm prepare`` has written.

    A batch is an int64 tensor of shape (micro batch, positions + 1), of this process. All processes together see the
    batches that one process sees with as many micro batches more, and a resumed run continues with the next batch.

    Raises:
        FileNotFoundError: If the folder lacks the tokens.
        ValueError: If litgpt is given no tokenizer, or another one than the tokens were made with.
    """

    path: Path
    """The folder, with ``train.npy``, ``val.npy`` and ``tokenizer.json``."""
    seed: int = 0
    """Chooses the order of the training windows."""

    tokenizer: Tokenizer | None = field(default=None, init=False, repr=False)
    batch_size: int = field(default=1, init=False, repr=False)
    max_seq_length: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__init__()
        for name in ("tokenizer.json", *(f"{part}.npy" for part in PARTS)):
            if not (self.path / name).is_file():
                raise FileNotFoundError(
                    f"`data.path`: there is no {name} in {str(self.path)!r}; write"
                    f" lightning-adapm prepare --out_dir {self.path}"
                )

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        """Take litgpt's tokenizer, the windows per batch of a process, and the positions of a window."""
        self.connect_tokenizer(tokenizer)
        if max_seq_length is None:
            raise ValueError("`max_seq_length`: PreparedText needs the positions of a window")
        self.batch_size, self.max_seq_length = batch_size, max_seq_length

    def connect_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Take litgpt's tokenizer, if it is the text's."""
        if tokenizer is None or tokenizer.processor.to_str() != Tokenizer(self.path).processor.to_str():
            found = "none" if tokenizer is None else f"{tokenizer.model_name!r}"
            raise ValueError(
                f"`tokenizer_dir`: PreparedText needs the tokenizer that its tokens were made with, but got {found};"
                f" give {str(self.path)!r}"
            )
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int | None:
        """Tokens in the vocabulary; ``None`` before ``connect``."""
        return None if self.tokenizer is None else self.tokenizer.vocab_size

    def train_dataloader(self) -> DataLoader:
        """The endless, shuffled stream of training windows."""
        return WindowLoader(TrainLoader(self._tokens("train"), *self._sizes(), self.seed, **_processes()))

    def val_dataloader(self) -> DataLoader:
        """The validation windows, in order."""
        return WindowLoader(ValLoader(self._tokens("val"), *self._sizes(), **_processes()))

    def _tokens(self, part: str) -> np.ndarray:
        return np.load(self.path / f"{part}.npy", mmap_mode="r")

    def _sizes(self) -> tuple[int, int]:
        """Positions of a window, and windows per batch of all processes together."""
        return self.max_seq_length, self.batch_size * _processes()["world_size"]


class WindowLoader(DataLoader):
    """One of this package's loaders as the ``torch.utils.data.DataLoader`` that Fabric wants, which it can resume."""

    def __init__(self, windows: TrainLoader | ValLoader) -> None:
        super().__init__(_Windows(windows), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, where there is one."""
        windows = self.dataset.windows  # type: ignore[attr-defined]
        return windows.state_dict() if isinstance(windows, TrainLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved position."""
        windows = self.dataset.windows  # type: ignore[attr-defined]
        if isinstance(windows, TrainLoader):
            windows.load_state_dict(state_dict)


class _Windows(IterableDataset):
    """Iterable, so that Fabric adds no sampler: the windows are split over the processes already."""

    def __init__(self, windows: TrainLoader | ValLoader) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.windows)


def _processes() -> dict[str, int]:
    """Which share of every batch is this process's: litgpt's strategies give all of them different data."""
    if dist.is_available() and dist.is_initialized():
        return {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return {"rank": 0, "world_size": 1}
