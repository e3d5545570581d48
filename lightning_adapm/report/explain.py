"""The roles of any model before training, and the bytes of AdaPM and other optimizers."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn

from lightning_adapm.moments.policy import momentum_table
from lightning_adapm.optim import AdaPM, PartialMuon, RoleOptimizer
from lightning_adapm.report.plan import Row, StateBytes, plan
from lightning_adapm.report.tables import as_text, pieces_table, show_count
from lightning_adapm.roles.assign import check_heads, unmatched_message
from lightning_adapm.roles.context import Named
from lightning_adapm.roles.piece import UNMATCHED

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "Adam-mini": {"momentum": momentum_table("full", "full"), "second_moment": "block", "state_dtype": None},
    "AdaPM": {},
    "AdaPM factored": {"second_moment": "factored"},
}
"""Variants of :func:`compare`, as changes to AdaPM's parameter groups; Adam-mini's momentum is float32 as published."""

_SHARED = ("rank", "roles", "unmatched", "state_dtype")
"""Options with the same meaning in AdaPM and PartialMuon."""


@dataclass(frozen=True)
class Explanation:
    """Roles and bytes of every trainable parameter of a model, iterable over rows and printable as a table.

    ``frozen`` is the number of elements that are not trained. Where ``refuses`` is true, training would refuse matrices
    without a role. Here they are rows with the role ``"unmatched"``, counted with full momentum.
    """

    rows: tuple[Row, ...]
    frozen: int = 0
    refuses: bool = False

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def total(self) -> StateBytes:
        """Bytes over all rows."""
        return sum((row.bytes for row in self.rows), StateBytes())

    @property
    def adamw(self) -> StateBytes:
        """AdamW's bytes over all rows, in float32."""
        return sum((row.adamw for row in self.rows), StateBytes())

    @property
    def adamw_in_dtype(self) -> StateBytes:
        """Bytes of ``torch.optim.AdamW`` over all rows, with moments in the parameters' dtype."""
        return sum((row.adamw_in_dtype for row in self.rows), StateBytes())

    @property
    def parameters(self) -> int:
        """Number of trainable elements."""
        return sum(row.numel for row in self.rows)

    @property
    def unmatched(self) -> tuple[Row, ...]:
        """Rows without a role."""
        return tuple(row for row in self.rows if row.role == UNMATCHED)

    def __str__(self) -> str:
        lines = [as_text(pieces_table(self.rows))]
        if self.frozen:
            lines.append(f"{show_count(self.frozen)} frozen parameters: no state")
        if self.unmatched and self.refuses:
            lines.append(self.advice)
        return "\n".join(lines)

    @property
    def advice(self) -> str:
        """Text with the argument that gives the unmatched rows a role."""
        return unmatched_message((row.name, row.shape, row.why) for row in self.unmatched)


def explain(model: nn.Module | RoleOptimizer, **adapm_options: Any) -> Explanation:
    """Explain the role that AdaPM gives every parameter of a model, and the bytes of its state; allocates nothing.

    Args:
        model: Any module, on any device, the meta device included, wrapped or not; or an optimizer of this package,
            whose own options then count. A module with the mixin starts from its ``adapm`` settings, and from the
            optimizer that they name.
        **adapm_options: Keyword arguments of :class:`~lightning_adapm.AdaPM`, or of the optimizer that the module's
            settings name.

    Returns:
        A row for each piece of each trainable parameter, with its shape, role, reason and bytes; it prints as a table.

    Raises:
        ValueError: An option is out of range. An unknown role is no error but the role ``"unmatched"``.
        TypeError: An option is unknown, or there are options with an optimizer.
    """
    if isinstance(model, RoleOptimizer):
        if adapm_options:
            raise TypeError(f"explain(optimizer) shows the optimizer's own options, but got {', '.join(adapm_options)}")
        params = [param for group in model.param_groups for param in group["params"]]
        return Explanation(tuple(plan(model)), _frozen(params))
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain needs a module or an optimizer of the package, but got {type(model).__name__}")
    make: type[Any] = getattr(model, "adapm_class", AdaPM)
    optimizer, refuses = _optimizer(make, model, {**getattr(model, "adapm_options", {}), **adapm_options})
    return Explanation(tuple(plan(optimizer)), _frozen(model.parameters()), refuses)


def compare(model: nn.Module, **adapm_options: Any) -> dict[str, Explanation]:
    """Explain each of :data:`VARIANTS` and PartialMuon, by name.

    ``"AdaPM"`` has exactly these options. PartialMuon has its own table of momenta. Arguments and errors are those of
    :func:`explain`. Adam-mini is left out where the number of heads is unknown.
    """
    options = _stated(model)
    shared = {key: value for key, value in {**options, **adapm_options}.items() if key in _SHARED}
    if getattr(model, "adapm_class", AdaPM) is not AdaPM:  # what shapes the state of that one is not AdaPM's
        options = shared
    optimizer, refuses = _optimizer(AdaPM, model, {**options, **adapm_options})
    frozen, heads_known = _frozen(model.parameters()), _heads_are_known(optimizer)
    explanations = {}
    for name, changes in VARIANTS.items():
        if heads_known or changes.get("second_moment") != "block":
            unstated = {key: value for key, value in changes.items() if key not in shared}
            explanations[name] = Explanation(tuple(plan(optimizer, unstated)), frozen, refuses)
    muon, _ = _optimizer(PartialMuon, model, shared)
    explanations[PartialMuon.__name__] = Explanation(tuple(plan(muon)), frozen, refuses)
    return explanations


def _stated(model: nn.Module) -> dict[str, Any]:
    """Settings of a module with the mixin, without its optimizer's defaults, which another optimizer does not share."""
    settings: Any = model
    if not hasattr(model, "adapm_options"):
        return {}
    known = signature(settings.adapm_class).parameters
    return {key: value for key, value in settings.adapm_options.items() if value != known[key].default}


def _optimizer(make: type[Any], model: nn.Module, options: Mapping[str, Any]) -> tuple[RoleOptimizer, bool]:
    """Build an optimizer over a model; also return whether it would refuse to train for lack of roles."""
    refuses = options.get("unmatched", "error") == "error"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="unmatched=")  # the table shows them
        return make(model.named_parameters(), **dict(options) | ({"unmatched": "full"} if refuses else {})), refuses


def _heads_are_known(optimizer: RoleOptimizer) -> bool:
    try:
        for param, pieces in optimizer.pieces.items():
            check_heads(Named("", param), pieces)
    except ValueError:
        return False
    return True


def _frozen(params: Iterable[Tensor]) -> int:
    return sum(param.numel() for param in params if not param.requires_grad)
