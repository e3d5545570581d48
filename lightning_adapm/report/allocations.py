"""Tracking of allocations: the bytes of every tensor that operations create, while it is alive."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the values of a tensor: itself, or what is inside a quantized one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


class AllocationTracker(TorchDispatchMode):
    """Tracks every storage that operations make in its context, by category, and counts the operations.

    What an operation allocates and frees inside itself is not seen. ``peak`` is by category at the moment when most
    was alive.
    """

    def __init__(self, known: Mapping[str, Iterable[Tensor]] | None = None) -> None:
        super().__init__()
        self.category = "transient"
        self.begin(known or {})

    def begin(self, known: Mapping[str, Iterable[Tensor]]) -> None:
        """Start anew with the ``known`` tensors, by category."""
        self.operations = 0
        self.peak: Counter[str] = Counter()
        self._alive: Counter[str] = Counter()
        self._entries: dict[int, tuple[StorageWeakRef, str, int]] = {}
        for category, tensors in known.items():
            for tensor in tensors:
                self._enter(tensor, category)
        self._note()

    def claim(self, tensor: Tensor, category: str) -> None:
        """Count the storage of ``tensor`` as ``category`` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._entries:
            self._leave(key)
        self._enter(tensor, category)
        if self._alive.total() == self.peak.total():
            self.peak = Counter(self._alive)

    def alive(self) -> Counter[str]:
        """Bytes that are alive now, by category."""
        self._leave_expired()
        return Counter(self._alive)

    def end_section(self) -> Counter[str]:
        """Return the peak since the last section ended; the next one starts from what is alive now."""
        peak, self.peak = self.peak, self.alive()
        return peak

    @contextmanager
    def following(self) -> Iterator[None]:
        """Track within the context; compiled code runs operation by operation there, so that each is seen."""
        with torch.compiler.set_stance("force_eager"), self:
            yield

    @contextmanager
    def counting(self, category: str) -> Iterator[None]:
        """Within the context, count allocations under ``category``."""
        before, self.category = self.category, category
        try:
            yield
        finally:
            self.category = before

    def _enter(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        # no other storage has this key as long as there is a weak reference to the one that had it
        if storage._cdata not in self._entries:
            self._entries[storage._cdata] = (StorageWeakRef(storage), category, storage.nbytes())
            self._alive[category] += storage.nbytes()

    def _leave(self, key: int) -> None:
        _, category, size = self._entries.pop(key)
        self._alive[category] -= size

    def _note(self) -> None:
        if self._alive.total() <= self.peak.total():
            return
        self._leave_expired()
        if self._alive.total() > self.peak.total():
            self.peak = Counter(self._alive)

    def _leave_expired(self) -> None:
        for key in [key for key, (storage, _, _) in self._entries.items() if storage.expired()]:
            self._leave(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        known = len(self._entries)
        for tensor in (out,) if type(out) is Tensor else tree_leaves(out):
            if isinstance(tensor, Tensor):
                for plain in plain_tensors(tensor):
                    self._enter(plain, self.category)
        if len(self._entries) > known:  # views allocate nothing
            self._note()
        return out
