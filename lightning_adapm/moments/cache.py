"""Device tensors that each optimizer keeps between steps, because making them again would take longer."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor

_Value = TypeVar("_Value", bound="Tensor | tuple[Tensor, Any]")

MOST = 4096
"""Number of tensors that are kept. Most are tables of addresses, of a few bytes each."""


class DeviceCache:
    """The tensors that an optimizer keeps; they are freed with it, and are no part of its state.

    Inside :func:`using`, :func:`kept` finds them.
    """

    def __init__(self) -> None:
        self._held: OrderedDict[Hashable, Any] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept now."""
        tensors = (value if isinstance(value, Tensor) else value[0] for value in self._held.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def get(self, key: Hashable, make: Callable[[], _Value]) -> _Value:
        """Return the value of ``key``, a tensor or a tuple that begins with one; make it if there is none."""
        if key in self._held:
            self._held.move_to_end(key)
        else:
            self._held[key] = make()
            if len(self._held) > MOST:
                self._held.popitem(last=False)
        found: _Value = self._held[key]
        return found


_CURRENT: ContextVar[DeviceCache | None] = ContextVar("cache of the optimizer whose step runs", default=None)


@contextmanager
def using(cache: DeviceCache) -> Iterator[None]:
    """Within the context, ``cache`` is that of the step that runs."""
    token = _CURRENT.set(cache)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def kept(key: Hashable, make: Callable[[], _Value]) -> _Value:
    """Look ``key`` up in the cache of the step that runs; outside of steps, make its value anew."""
    cache = _CURRENT.get()
    return make() if cache is None else cache.get(key, make)
