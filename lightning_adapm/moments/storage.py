"""Storage of optimizer state, through which alone moments read and write their entries."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_adapm.sharding.find import has_values


class State(Protocol):
    """The state of one piece: tensors, and numbers that the host reads without waiting for the device."""

    def __getitem__(self, key: str, /) -> Any: ...

    def __setitem__(self, key: str, value: Any, /) -> None: ...


@dataclass(frozen=True)
class Storage:
    """Values in one tensor of a dtype.

    A storage in another form (codes with scales, for instance) overrides :meth:`make`, :meth:`read` and :meth:`write`,
    and sets ``plain`` to False. It keeps its tensors under the entry's key with one of ``suffixes`` each, so that
    code without support for the form finds nothing under the key itself, instead of using codes as values. State dicts
    of sharded parameters hold the values that it reads, where it is not ``rowwise``.

    Args:
        dtype: Dtype of the tensor. None is the dtype of the arithmetic: float32, or float64 for float64 parameters.
    """

    dtype: torch.dtype | None = None
    plain: ClassVar[bool] = True
    """Whether plain values are stored, which kernels may read and write in place, and whose slices can be taken."""
    rowwise: ClassVar[bool] = False
    """Every tensor has the entry's dimensions but the last, and a shard's rows are stored as they are in the whole."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """Endings of its tensors' keys, after the entry's own key; empty for one tensor under that key."""

    @property
    def of_bases(self) -> "Storage":
        """Storage of orthonormal bases where momentum is stored like this."""
        return self

    def make(self, key: str, shape: torch.Size, like: Tensor) -> dict[str, Tensor]:
        """Make zeros for an entry of ``shape``, on the device of ``like``, whose dtype is that of the arithmetic."""
        return {key: like.new_zeros(shape, dtype=self.dtype)}

    def read(self, states: Sequence[State], key: str) -> list[Tensor]:
        """Read the values of an entry in several states. Plain values are the stored tensors themselves."""
        return [state[key] for state in states]

    def write(self, states: Sequence[State], key: str, values: Sequence[Tensor]) -> None:
        """Store values. Tensors that :meth:`read` returned and that were changed in place are not copied.

        A value beyond the range of the dtype becomes its largest number: an infinity would stay forever.
        """
        stored = [state[key] for state in states]
        if all(map(is_, stored, values)):
            return
        same = _same if has_values(stored[0]) else is_
        pairs = [pair for pair in zip(stored, values, strict=True) if not same(*pair)]
        if not pairs:
            return
        kept, new = [stored for stored, _ in pairs], [value for _, value in pairs]
        top = torch.finfo(kept[0].dtype).max
        if 2 * top < torch.finfo(new[0].dtype).max:
            new = [value.clamp(-top, top) for value in new]
        torch._foreach_copy_(kept, new)

    @classmethod
    def kinds(cls) -> Iterator["type[Storage]"]:
        """This storage and all that derive from it."""
        yield cls
        for kind in cls.__subclasses__():
            yield from kind.kinds()


EXACT = Storage()
"""Storage in the dtype of the arithmetic."""


def decoded(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Decode saved entries of any storage to their values."""
    values = dict(saved)
    for kind in Storage.kinds():
        if not kind.suffixes:
            continue
        first = kind.suffixes[0]
        for key in [key.removesuffix(first) for key in saved if key.endswith(first)]:
            if all(key + suffix in saved for suffix in kind.suffixes):
                (values[key],) = kind().read([saved], key)  # type: ignore[list-item]
                for suffix in kind.suffixes:
                    del values[key + suffix]
    return values


def _same(stored: Tensor, value: Tensor) -> bool:
    return stored.dtype == value.dtype and stored.data_ptr() == value.data_ptr() != 0


@dataclass(frozen=True)
class Entry:
    """State of one matrix under one key of a moment.

    Args:
        shape: Shape for the matrix that it was asked for. None is a number that the host keeps.
        rows: The first dimension counts the rows of the matrix, so that it is sharded as they are. Entries of a stack
            of matrices are always sharded along the stack, whatever this is.
        columns: The last dimension counts the columns of the matrix. Processes that share its rows may keep some
            columns each; see :meth:`lightning_adapm.sharding.reduction.Reduction.columns`.
        storage: How the values are kept.
    """

    shape: torch.Size | None
    rows: bool = False
    columns: bool = False
    storage: Storage = EXACT

    def make(self, key: str, like: Tensor, kept: tuple[int, int] | None = None) -> dict[str, Any]:
        """Make zeros; of an entry with ``columns`` only those from ``kept[0]`` up to ``kept[1]``."""
        if self.shape is None:
            return {key: 0}
        shape = self.shape if kept is None or not self.columns else (*self.shape[:-1], kept[1] - kept[0])
        return self.storage.make(key, torch.Size(shape), like)
