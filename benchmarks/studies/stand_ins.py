"""Stand-ins for packages that another package imports, but that what is used of it does not need."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType


class StandIn(ModuleType):
    """A module in which every name is an empty class, from which others may be derived but not used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # those who ask whether the package is there get an answer

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def standing_in(modules: tuple[str, ...]) -> Iterator[None]:
    """A context in which modules of packages that are not installed can be imported."""
    missing = [name for name in modules if importlib.util.find_spec(name.partition(".")[0]) is None]
    before = {name: sys.modules.get(name) for name in missing if name in sys.modules}
    sys.modules.update({name: StandIn(name) for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]
        sys.modules.update(before)  # type: ignore[arg-type]  # None forbids an import
