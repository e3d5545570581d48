"""Parameters that move together inside backward: found as their gradients arrive, and kept for later steps."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor

Selection = Sequence[tuple[int, list[Tensor]]]
"""Indices of parameter groups, each with some of the group's parameters."""


def params_of(selected: Iterable[tuple[Any, list[Tensor]]]) -> list[Tensor]:
    """List the parameters of a selection, group by group."""
    return [param for _, params in selected for param in params]


def are(these: Collection[Any], those: Collection[Any]) -> bool:
    """Whether two collections hold the same objects in the same order."""
    return len(these) == len(those) and all(map(is_, these, those))


class Turn(NamedTuple):
    """Parameters that move together."""

    selected: Selection
    first: Tensor
    """The parameter whose gradient comes first."""
    last: Tensor
    """The parameter whose gradient comes last."""

    @property
    def params(self) -> list[Tensor]:
        """The parameters, group by group."""
        return params_of(self.selected)


class Turns:
    """The turns of one step, valid for later steps while the same parameters are trained."""

    def __init__(self) -> None:
        self._trained: list[Tensor] = []
        self._found: list[Turn] = []
        self._change = False

    def of(self, trained: Sequence[Tensor]) -> Sequence[Turn]:
        """Return the turns of the ``trained`` parameters; empty while these are unknown."""
        return self._found if are(trained, self._trained) else []

    def keep(self, trained: Sequence[Tensor], turns: Sequence[Turn]) -> None:
        """Keep the turns of a step that has moved all ``trained`` parameters."""
        if not self._change:
            self._trained, self._found = list(trained), list(turns)

    def give_up(self) -> None:
        """Stop keeping turns, because gradients came in another order."""
        self._trained, self._found, self._change = [], [], True


class Waiting:
    """Parameters whose gradients are complete and wait for others, so that pieces of one shape move together.

    They wait as long as the smallest gradient that is still to come would fit into :attr:`bound` with theirs.

    Args:
        groups: The parameter groups.
        blocks: Name of the transformer block around each parameter, None outside.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], blocks: Mapping[Tensor, str | None]) -> None:
        self._places = {
            param: (index, place)
            for index, group in enumerate(groups)
            for place, param in enumerate(group["params"])
            if param.requires_grad
        }
        self._to_come = Counter(param.nbytes for param in self._places)
        """Number of gradients that are still to come, by their size in bytes."""
        self._sizes = sorted(self._to_come, reverse=True)
        """The sizes in bytes, in descending order."""
        together: Counter[str | Tensor] = Counter()
        for param in self._places:
            together[blocks[param] or param] += param.nbytes
        self.bound = max(together.values(), default=0)
        """Bytes of the gradients of the largest transformer block or parameter: the most that wait for another."""
        self._params: list[Tensor] = []
        self._bytes = 0

    def add(self, param: Tensor) -> bool:
        """Add a parameter whose gradient is complete; return whether all that wait should move now."""
        self._params.append(param)
        self._bytes += param.nbytes
        self._to_come[param.nbytes] -= 1
        while self._sizes and not self._to_come[self._sizes[-1]]:
            self._sizes.pop()
        smallest = self._sizes[-1] if self._sizes else self.bound
        return self._bytes + smallest > self.bound

    def take(self) -> Turn:
        """Empty the collection and return its parameters in the order of their groups."""
        found: dict[int, list[Tensor]] = {}
        for param in sorted(self._params, key=self._places.__getitem__):
            found.setdefault(self._places[param][0], []).append(param)
        turn = Turn(list(found.items()), self._params[0], self._params[-1])
        self._params, self._bytes = [], 0
        return turn
