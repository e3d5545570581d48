"""Fingerprints of the objects of a step, which are quickly compared with those of another step.

This is done for hundreds of parameters in every step, so that nothing but C runs for each of them.
"""

from collections.abc import Iterable, Sequence
from itertools import compress
from operator import not_
from typing import Any

from torch import Tensor


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Address of the first element of each tensor."""
    return list(map(Tensor.data_ptr, tensors))


class Fingerprint:
    """Addresses of the tensors among some objects, and identities of the others.

    Nothing is kept alive. A tensor at the address of one that is gone lies where that lay, and may take its place.
    """

    def __init__(self, objects: Sequence[Any]) -> None:
        self._are_tensors = [isinstance(each, Tensor) for each in objects]
        self._are_others = list(map(not_, self._are_tensors))
        self._found = self._find(objects)

    def matches(self, objects: Sequence[Any]) -> bool:
        """Whether other objects are the same ones, with their tensors at the same addresses."""
        try:
            return len(objects) == len(self._are_tensors) and self._find(objects) == self._found
        except TypeError:  # another object in the place of a tensor
            return False

    def _find(self, objects: Sequence[Any]) -> tuple[list[int], list[int]]:
        return addresses(compress(objects, self._are_tensors)), list(map(id, compress(objects, self._are_others)))
