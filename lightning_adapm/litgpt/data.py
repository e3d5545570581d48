"""Data for litgpt's own commands, without a download and without litdata. This module imports litgpt."""

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
    """Pretraining windows from a folder written by ``lightning-adapm prepare``.

    A batch of one process is an int64 tensor of shape (micro batch, positions + 1). N processes together read the
    batches that one process reads with N times the micro batch. A resumed run continues with the next batch.

    Raises:
        FileNotFoundError: The folder lacks the tokens.
        ValueError: litgpt has no tokenizer, or another one than that of the tokens.
    """

    path: Path
    """Folder with ``train.npy``, ``val.npy`` and ``tokenizer.json``."""
    seed: int = 0
    """Seed of the order of the training windows."""

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
        """Set litgpt's tokenizer, the windows per batch of one process, and the positions per window.

        Raises:
            ValueError: ``max_seq_length`` is missing, or the tokenizer is not that of the tokens.
        """
        self.connect_tokenizer(tokenizer)
        if max_seq_length is None:
            raise ValueError("`max_seq_length`: PreparedText needs the positions per window, but got None; give an int")
        self.batch_size, self.max_seq_length = batch_size, max_seq_length

    def connect_tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Set litgpt's tokenizer.

        Raises:
            ValueError: It is not the tokenizer of the tokens.
        """
        if tokenizer is None or tokenizer.processor.to_str() != Tokenizer(self.path).processor.to_str():
            found = "none" if tokenizer is None else f"{tokenizer.model_name!r}"
            raise ValueError(
                f"`tokenizer_dir`: PreparedText needs the tokenizer that its tokens were made with, but got {found};"
                f" give {str(self.path)!r}"
            )
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int | None:
        """Number of tokens in the vocabulary; ``None`` before ``connect``."""
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
        """Positions per window, and windows per batch of all processes."""
        return self.max_seq_length, self.batch_size * _processes()["world_size"]


class WindowLoader(DataLoader):
    """One of this package's loaders as a ``torch.utils.data.DataLoader``, which Fabric requires and can resume."""

    def __init__(self, windows: TrainLoader | ValLoader) -> None:
        super().__init__(_Windows(windows), batch_size=None)

    def state_dict(self) -> dict[str, Any]:
        """Position in the training stream; empty for validation."""
        windows = self.dataset.windows  # type: ignore[attr-defined]
        return windows.state_dict() if isinstance(windows, TrainLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved position."""
        windows = self.dataset.windows  # type: ignore[attr-defined]
        if isinstance(windows, TrainLoader):
            windows.load_state_dict(state_dict)


class _Windows(IterableDataset):
    """Dataset without a sampler; the loader itself splits the windows over the processes."""

    def __init__(self, windows: TrainLoader | ValLoader) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.windows)


def _processes() -> dict[str, int]:
    """This process's share of every batch; under litgpt's strategies all processes read different data."""
    if dist.is_available() and dist.is_initialized():
        return {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    return {"rank": 0, "world_size": 1}
