"""Bytes that an optimizer's state holds."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_adapm.report.allocations import AllocationTracker, plain_tensors

__all__ = ["AllocationTracker", "held_bytes", "state_bytes", "storages", "tensors_in"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Find the plain tensors in a state, also inside containers, objects of packages and quantized tensors."""
    if isinstance(value, Tensor):
        yield from plain_tensors(value)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from tensors_in(vars(value))


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by storage, each once however many tensors share it."""
    kept = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
    return kept


def held_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(storages(tensors).values())


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the state, including quantized ones and those inside objects of packages."""
    return held_bytes(tensors_in(list(optimizer.state.values())))
