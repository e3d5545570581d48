"""Parameter groups of an optimizer, with the name, the role and the pieces of each parameter."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_adapm.optim import groups, options
from lightning_adapm.optim.part_table import PartTable
from lightning_adapm.optim.registry import Registry
from lightning_adapm.roles.assign import assign_roles
from lightning_adapm.roles.context import Named
from lightning_adapm.roles.piece import Piece
from lightning_adapm.state.state_dict import FORMAT_VERSION, Checkpointed


class RoleGroups(Checkpointed):
    """An optimizer whose parameter groups fill in options, find roles, and may be changed in place by callers.

    Args:
        defaults: Options of the parameter groups.
        roles: Roles for names, ``{regular expression: role or policy}``, searched in order before any built-in rule.
        unmatched: Policy of matrices without a known role. ``"error"`` refuses and lists them.
        roles_matter: Whether a matrix is treated by its role, so that a role that is not found is worth a warning.

    Raises:
        ValueError: An option is out of range.
    """

    names: dict[Tensor, str]
    """Name of each parameter."""
    roles: dict[Tensor, str]
    """Role of each parameter."""
    pieces: dict[Tensor, tuple[Piece, ...]]
    """Pieces of each parameter, each with one role."""
    reasons: dict[Tensor, str]
    """Rule that decided the role of each parameter."""
    blocks: dict[Tensor, str | None]
    """Name of the transformer block around each parameter; None outside."""

    automatic: ClassVar[options.Automatic] = {}
    """Options that may be ``"auto"``, each with a function that derives it from the other options of a group."""

    def __init__(
        self, defaults: Mapping[str, Any], roles: Mapping[str, str] | None, unmatched: str, roles_matter: bool
    ) -> None:
        options.check_roles(roles, unmatched)
        self._automatic = options.are_automatic(defaults, self.automatic)
        """Options that are automatic in groups that do not state them."""
        stated = {**defaults, **{option: self.automatic[option](defaults) for option in self._automatic}}
        plain = options.plain(stated, stated, unmatched)
        self.check_options(plain)
        self.name_rules = dict(roles or {})
        self.unmatched = unmatched
        self.roles_matter = roles_matter
        self._registry = known = Registry()
        self.names, self.roles, self.pieces = known.names, known.roles, known.pieces
        self.reasons, self.blocks = known.reasons, known.blocks
        self._table = PartTable(self._registry)
        # without groups: torch would add them one by one, and roles are found over all
        super().__init__([{"params": []}], {**plain, "format_version": FORMAT_VERSION})
        self.param_groups.clear()

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Refuse options of a parameter group that are out of range, by raising a ValueError."""
        options.check(group)

    def check_pieces(self, item: Named, pieces: tuple[Piece, ...], group: Mapping[str, Any]) -> None:
        """Refuse pieces of a parameter that this optimizer cannot treat, by raising a ValueError."""

    def filled(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Copy a parameter group, with the defaults of options that it lacks; automatic ones follow from the others.

        Raises:
            ValueError: An option belongs to another optimizer and would change the result, or is not a group's.
        """
        groups.check_stated(type(self).__name__, group)
        filled = {key: list(value) if isinstance(value, list) else value for key, value in self.defaults.items()}
        automatic = options.are_automatic(group, self.automatic)
        stated = {key: value for key, value in group.items() if key not in automatic}
        filled |= options.plain(stated, self.defaults, self.unmatched)
        automatic |= self._automatic - group.keys()
        return filled | {option: self.automatic[option](filled) for option in automatic}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in ``torch.optim``; it may hold anything that the constructor accepts.

        Roles are those that the parameters have in the whole model. A group that is refused changes nothing.

        Raises:
            TypeError: The group is not a dict, or its parameters lack names and roles.
            ValueError: An option is out of range, or a matrix has no role.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        self._add([param_group])

    def _add(self, added: list[dict[str, Any]]) -> None:
        """Add groups together: all of them, or none where one is refused."""
        filled = [self.filled(group) for group in added]
        for group in filled:
            self.check_options(group)
        before = len(self.param_groups)
        assigned = assign_roles(
            filled, self.names, before, self.name_rules, self.unmatched, self.roles_matter, self.check_pieces
        )
        try:
            for group in assigned.groups:
                super().add_param_group(group)
        except Exception:
            del self.param_groups[before:]
            raise
        for group, own in zip(added, assigned.groups, strict=True):
            group.update(own)  # as with torch, the caller's group is the optimizer's: wrappers change rates in it
        self.param_groups[before:] = added
        self._registry.add(assigned, self.structure)

    def __repr__(self) -> str:
        return groups.as_text(type(self).__name__, self.param_groups)

    def follow_groups(self) -> None:
        """Bring names and roles into line with the groups' lists of parameters, which callers may change in place.

        Raises:
            TypeError: A parameter was not added with :meth:`add_param_group`, and no live module holds it.
        """
        if self._table.lists(self.param_groups):
            return
        self._add_appended([group for group in self.param_groups if not self.pieces.keys() >= set(group["params"])])
        for group in self.param_groups:
            self._registry.label(group)
        if not self._table.lists(self.param_groups):
            self._drop_caches(self.param_groups)

    def _add_appended(self, groups: list[dict[str, Any]]) -> None:
        """Add groups that callers appended to ``param_groups`` themselves, as callbacks do in a resumed run."""
        held = self.param_groups
        self.param_groups = [each for each in held if all(each is not group for group in groups)]
        try:
            for group in groups:
                bare = {key: value for key, value in group.items() if key not in ("param_names", "roles")}
                self._add([bare])
                group.update(bare)
        except TypeError:
            for group in groups:
                options.check_held(type(self).__name__, group, self.pieces)
            raise
        finally:
            self.param_groups = held

    def _drop_caches(self, groups: Sequence[Mapping[str, Any]] = ()) -> None:
        """Drop everything that can be rebuilt from the registry and the parameter groups."""
        self._table = PartTable(self._registry, groups)
