"""Batches of token windows: a seeded, resumable training stream and a fixed validation set.

Both split each global batch over the processes, so that a run reads the same data on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor


class _Windows:
    """Windows of ``block_size + 1`` tokens, and this process's share of each batch.

    Args:
        tokens: All tokens, one-dimensional; may be memory-mapped.
        block_size: Positions that the model sees. One more token is the last target, which the next window begins with.
        batch_size: Windows per global batch, over all processes.
        rank: Rank of this process among those that read different data.
        world_size: Number of processes that read different data.

    Raises:
        ValueError: The tokens do not fill one global batch, or a batch cannot be split evenly.
    """

    text = "text"  # its name in error messages

    def __init__(
        self, tokens: np.ndarray, block_size: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"`batch_size`: {batch_size} windows cannot be split over {world_size} processes, which share"
                f" them; give a multiple of {world_size}"
            )
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.windows = max(0, len(tokens) - 1) // block_size
        if self.windows < batch_size:
            raise ValueError(
                f"The {self.text} has {len(tokens)} tokens, {self.windows} windows of `block_size` {block_size}, fewer"
                f" than one batch of {batch_size}; give more text, or a smaller `block_size` or `batch_size`"
            )
        share = batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)

    def _batch(self, windows: np.ndarray) -> Tensor:
        """This process's rows of the global batch of these windows, int64 of shape (rows, ``block_size + 1``)."""
        starts = windows[self._share, None] * self.block_size
        return torch.from_numpy(self.tokens[starts + np.arange(self.block_size + 1)].astype(np.int64))


class TrainLoader(_Windows):
    """Endless stream of shuffled batches; each ``iter()`` yields the next ``len()`` of them.

    The order of an epoch's windows depends on ``(seed, epoch)`` alone. Batch number ``position`` is therefore the same
    on any number of processes, after a resume, and whatever else draws random numbers. ``position`` belongs to the
    loader, so that a new iterator continues where the last one stopped. A resume needs that, and so does an epoch cut
    short by ``limit_train_batches``.

    Args:
        tokens: All tokens, one-dimensional; may be memory-mapped.
        block_size: Positions per window.
        batch_size: Windows per global batch, over all processes.
        seed: Seed of the order; not negative.
        rank: Rank of this process among those that read different data.
        world_size: Number of processes that read different data.
    """

    text = "training text"

    def __init__(
        self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(tokens, block_size, batch_size, rank, world_size)
        self.seed = seed
        self.position = 0
        self._order: tuple[int, np.ndarray] = (-1, np.array([], np.int64))

    def __len__(self) -> int:
        return self.windows // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(len(self)):
            epoch, batch = divmod(self.position, len(self))
            # Counted before the batch is yielded, so that a checkpoint written while it is in use names the next one.
            self.position += 1
            first = batch * self.batch_size
            yield self._batch(self._permutation(epoch)[first : first + self.batch_size])

    def state_dict(self) -> dict[str, Any]:
        """Position in the stream, in batches, and the settings that determine the stream."""
        return {"position": self.position, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the saved position; with other data or settings, start over and warn."""
        saved = {key: value for key, value in state_dict.items() if key != "position"}
        if saved == self._identity():
            self.position = state_dict["position"]
            return
        self.position = 0
        rank_zero_warn(
            f"The checkpoint's data order ({saved}) is not this run's ({self._identity()}), so training starts at"
            " the first batch of the new order; to continue the old one, give the same text, `seed`, `block_size` and"
            " `batch_size`"
        )

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "windows": self.windows,
            "block_size": self.block_size,
            "batch_size": self.batch_size,
        }

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.windows))
        return self._order[1]


class ValLoader(_Windows):
    """The first windows of the text in order, the same on every pass.

    Args:
        tokens: All tokens, one-dimensional; may be memory-mapped.
        block_size: Positions per window.
        batch_size: Windows per global batch, over all processes; fewer where the text does not fill one batch.
        batches: Maximum number of batches; ``None`` for all full ones.
        rank: Rank of this process among those that read different data.
        world_size: Number of processes that read different data.
    """

    text = "validation text"

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        batch_size: int,
        batches: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        available = max(0, len(tokens) - 1) // block_size // world_size * world_size
        super().__init__(tokens, block_size, min(batch_size, available) or batch_size, rank, world_size)
        full = self.windows // self.batch_size
        self._batches = full if batches is None else min(batches, full)

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Tensor]:
        for batch in range(self._batches):
            yield self._batch(np.arange(batch * self.batch_size, (batch + 1) * self.batch_size))
