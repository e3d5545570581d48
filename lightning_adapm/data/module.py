"""A data module for text on this machine."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np

from lightning_adapm.data.corpus import PARTS, Corpus, find_corpus
from lightning_adapm.data.loaders import TrainLoader, ValLoader
from lightning_adapm.data.tokens import (
    MIN_VOCAB_SIZE,
    build_cache,
    cache_folder,
    default_cache_dir,
    import_tokenizers,
)


class TextDataModule(L.LightningDataModule):
    """Language-model batches from text files, with a byte-level BPE that is trained on them.

    Files are split into training and validation, and their tokens are cached. Batches are int64 tensors of shape
    ``(batch_size, block_size + 1)``; the model shifts inputs and targets. The order of the training batches depends on
    ``seed`` alone, not on torch's random state or on the number of processes. A resume in the middle of an epoch
    continues with the next batch.

    Args:
        path: A folder, where each file is a document, or one text file, whose last part is for validation. ``None`` for
            the sources of Python's standard library.
        pattern: Pattern of the files below the folder.
        exclude: Names of folders to skip at any depth. ``None`` skips none, or in the standard library its tests,
            installed packages and tables.
        val_fraction: Share of the files for validation, or of the bytes of one file; between 0 and 1.
        max_bytes: Maximum amount of text, in bytes, from a fixed, evenly spread choice of files. ``None`` for all.
        vocab_size: Maximum size of the vocabulary; at least 257, the bytes and the end-of-text token.
        block_size: Positions per window, in tokens.
        batch_size: Windows per batch, over all processes.
        val_batches: Maximum number of validation batches; ``None`` for all.
        seed: Seed of the order of the training batches.
        cache_dir: Folder in which tokens are kept between runs. ``None`` for ``$XDG_CACHE_HOME/lightning-adapm`` or
            ``~/.cache/lightning-adapm``.

    Raises:
        ValueError: An option is out of range, or, once the text is read, there is too little of it.
    """

    def __init__(
        self,
        path: str | None = None,
        pattern: str = "*.py",
        exclude: list[str] | None = None,
        val_fraction: float = 0.05,
        max_bytes: int | None = 16_000_000,
        vocab_size: int = 4096,
        block_size: int = 128,
        batch_size: int = 8,
        val_batches: int | None = None,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"`val_fraction` must lie between 0 and 1, but got {val_fraction}")
        if vocab_size < MIN_VOCAB_SIZE:
            raise ValueError(
                f"`vocab_size` must be at least {MIN_VOCAB_SIZE} (256 bytes and the end-of-text token), but got"
                f" {vocab_size}"
            )
        lowest = {"max_bytes": (max_bytes, 1), "block_size": (block_size, 1), "batch_size": (batch_size, 1)}
        lowest |= {"val_batches": (val_batches, 1), "seed": (seed, 0)}
        for name, (value, minimum) in lowest.items():
            if value is not None and value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, but got {value}")
        self.path = path
        self.pattern = pattern
        self.exclude = exclude
        self.val_fraction = val_fraction
        self.max_bytes = max_bytes
        self.max_vocab_size = vocab_size
        self.block_size = block_size
        self.batch_size = batch_size
        self.val_batches = val_batches
        self.seed = seed
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._tokenizer: Any = None
        self._folder: Path | None = None
        self._train_loader: TrainLoader | None = None

    @property
    def tokenizer(self) -> Any:
        """The trained ``tokenizers.Tokenizer``; ``None`` before ``setup``."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the trained vocabulary; before ``setup``, its maximum."""
        return self.max_vocab_size if self._tokenizer is None else self._tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str | None:
        """Digest that is equal for runs on the same batches; ``None`` before ``setup``."""
        if self._folder is None:
            return None
        order = f"{self._folder.name} {self.block_size} {self.batch_size} {self.val_batches} {self.seed}"
        return hashlib.sha256(order.encode()).hexdigest()[:16]

    def tokens(self, part: Literal["train", "val"]) -> np.ndarray:
        """All tokens of one part, one-dimensional and memory-mapped; available after ``setup``."""
        return self._tokens[part]

    def prepare_data(self) -> None:
        """Find, tokenize and cache the text; Lightning calls this on one process of a node."""
        build_cache(self.corpus(), self.max_vocab_size, self.cache_dir)

    def setup(self, stage: str | None = None) -> None:
        """Open the cached tokens; training starts at the first batch unless a checkpoint is loaded.

        Raises:
            RuntimeError: There are no tokens of this text in the cache.
        """
        self._folder = folder = cache_folder(self.corpus(), self.max_vocab_size, self.cache_dir)
        if not folder.is_dir():
            raise RuntimeError(
                f"TextDataModule has no tokens of this text in {self.cache_dir}; call `prepare_data` first"
            )
        self._tokenizer = import_tokenizers().Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokens = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in PARTS}
        if stage in (None, "fit"):
            self._train_loader = TrainLoader(
                self.tokens("train"), self.block_size, self.batch_size, self.seed, **self._processes()
            )

    def train_dataloader(self) -> TrainLoader:
        """The training stream, the same object throughout a fit, so that a reload does not restart it.

        Raises:
            RuntimeError: ``setup`` has not been called.
        """
        if self._train_loader is None:
            raise RuntimeError("TextDataModule has no training data yet; call `setup('fit')` first")
        return self._train_loader

    def val_dataloader(self) -> ValLoader:
        """The fixed validation windows."""
        return ValLoader(self.tokens("val"), self.block_size, self.batch_size, self.val_batches, **self._processes())

    def state_dict(self) -> dict[str, Any]:
        """Position in the training stream.

        Lightning saves the loader's state as well, but does not load it from a checkpoint written at the end of an
        epoch. It always loads the data module's.
        """
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the training stream at the saved position."""
        if self._train_loader is not None and "train_loader" in state_dict:
            self._train_loader.load_state_dict(state_dict["train_loader"])

    def corpus(self) -> Corpus:
        """The texts for training and for validation."""
        return find_corpus(self.path, self.pattern, self.exclude, self.val_fraction, self.max_bytes)

    def _processes(self) -> dict[str, int]:
        """This process's share of every batch: the strategy has the number of processes that read the same data."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (
            {"rank": 0, "world_size": 1}
            if kwargs is None
            else {"rank": kwargs["rank"], "world_size": kwargs["num_replicas"]}
        )
