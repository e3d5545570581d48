"""Table of an optimizer's parameters: names, roles, pieces, and the modules that hold them."""

from collections.abc import Collection, Sequence
from copy import copy
from typing import Any

from torch import Tensor

from lightning_adapm.optim.replaced import Built, Places
from lightning_adapm.roles.assign import Assigned
from lightning_adapm.roles.piece import Piece
from lightning_adapm.sharding.find import shape_of


class Registry:
    """Names, roles and pieces of an optimizer's parameters, keyed by the tensors themselves.

    It is copied with its optimizer, and is not part of a checkpoint. The optimizer has the same dictionaries as
    attributes; see :class:`lightning_adapm.optim.base.RoleOptimizer`.
    """

    def __init__(self) -> None:
        self.names: dict[Tensor, str] = {}
        self.roles: dict[Tensor, str] = {}
        self.pieces: dict[Tensor, tuple[Piece, ...]] = {}
        self.reasons: dict[Tensor, str] = {}
        self.blocks: dict[Tensor, str | None] = {}
        self.numbers: dict[Tensor, int] = {}
        """Numbers of the parameters, in the order in which they were added: the same on every process."""
        self.built: dict[Tensor, Built] = {}
        """Names, shapes and options that the pieces and the state of every parameter were made for."""
        self.places: Sequence[Places] | None = []
        """Places of the parameters in live modules; None where they are still to be found."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "places": None}  # other modules hold the parameters of a copy

    def add(self, assigned: Assigned, structure: Sequence[str]) -> None:
        """Add the parameters of new groups, whose options named in ``structure`` shape the state."""
        first = 1 + max(self.numbers.values(), default=-1)
        self.numbers.update((param, first + place) for place, param in enumerate(assigned.pieces))
        self.names.update(assigned.names)
        self.roles.update(assigned.roles)
        self.pieces.update(assigned.pieces)
        self.reasons.update(assigned.reasons)
        self.blocks.update(assigned.blocks)
        for group in assigned.groups:
            options = {option: copy(group[option]) for option in structure}
            self.built.update((param, Built(self.names[param], shape_of(param), options)) for param in group["params"])
        if self.places is not None:
            self.places = [*self.places, Places(assigned.roots.values(), assigned.names)]

    def keep_only(self, held: Collection[Tensor]) -> None:
        """Forget all parameters except ``held``, so that their memory is freed."""
        for known in (self.names, self.roles, self.pieces, self.reasons, self.blocks, self.built, self.numbers):
            for param in known.keys() - held:
                del known[param]

    def label(self, group: dict[str, Any]) -> None:
        """Update the names and roles in a parameter group to its parameters, and drop duplicates of these."""
        params = group["params"]
        if len(set(params)) != len(params):
            params = group["params"] = list(dict.fromkeys(params))
        if [self.names[param] for param in params] != group["param_names"]:
            group["param_names"] = [self.names[param] for param in params]
            group["roles"] = [self.roles[param] for param in params]
