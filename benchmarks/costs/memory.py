"""Bytes that an optimizer's state holds."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from lightning_adapm.report.allocations import AllocationTracker, tensors_in

__all__ = ["AllocationTracker", "held_bytes", "state_bytes", "storages", "tensors_in"]


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
