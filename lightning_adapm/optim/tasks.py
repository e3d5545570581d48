"""The pieces of one step: what is gathered of each, and which of them are processed together."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lightning_adapm.roles import Piece

# Pieces of one shape are taken through a step together while their gradients hold at most this many elements: small
# matrices share kernels, large ones (which fill a device alone) are not copied and bound the temporaries.
_BATCH_NUMEL = {"cpu": 1 << 16, "cuda": 1 << 24}


class Task(NamedTuple):
    """One piece in one step. ``param`` is a view to update, ``grad`` the gradient as a matrix."""

    name: str
    piece: Piece
    param: Tensor
    grad: Tensor
    state: "PieceState"


class Observer(Protocol):
    """Sees every piece of a step from inside it; see :class:`lightning_adapm.diagnostics.ResidualProbe`."""

    def __call__(self, task: Task, direction: Tensor, update: Tensor, clip_threshold: float | None) -> None:
        """``direction`` is the momentum used, ``update`` the normalised update before any clamp, in units of lr."""
        ...


class PieceState:
    """The entries of a parameter's state that belong to one piece, without their prefix."""

    __slots__ = ("_prefix", "_state")

    def __init__(self, state: dict[str, Any], prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def __getitem__(self, key: str) -> Any:
        return self._state[self._prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._state[self._prefix + key] = value

    def get(self, key: str) -> Any:
        return self._state.get(self._prefix + key)


def batches(tasks: list[Task]) -> Iterable[list[Task]]:
    """Pieces of one shape in batches of a bounded size."""
    grad = tasks[0].grad
    size = max(1, _BATCH_NUMEL.get(grad.device.type, _BATCH_NUMEL["cuda"]) // grad.numel())
    return (tasks[start : start + size] for start in range(0, len(tasks), size))
