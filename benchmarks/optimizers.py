"""Optimizers by name, with every option that they run under written out, and AdaPM's variants that are only tried."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adapm import AdaPM
from lightning_adapm.momentum import Direction, LowRankMomentum, Momentum, State
from lightning_adapm.optim.tasks import PieceState
from lightning_adapm.policy import momentum_table
from lightning_adapm.roles import Piece
from lightning_adapm.sharding import ONE_PROCESS, Reduction

DECAY = 0.1
"""Weight decay of every optimizer, on every parameter."""


def resolve(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the defaults filled in, as JSON can hold them: what identifies a run, and what it ran under."""
    if kind == "AdamW":
        return {"kind": kind, "betas": [0.9, 0.999], **options}
    signature = inspect.signature(AdaPM.__init__).parameters
    fixed = (
        "self",
        "params",
        "lr",
        "weight_decay",
        "eps",
        "roles",
        "unmatched",
        "no_decay",
        "basis",
        "maximize",
        "update_in_backward",
    )
    defaults = {name: item.default for name, item in signature.items() if name not in fixed}
    resolved = {"kind": kind, **defaults, **options}
    resolved["momentum"] = momentum_table(resolved["momentum"], "error")
    resolved["betas"] = list(resolved["betas"])
    return resolved


def build(
    resolved: Mapping[str, Any], named: Iterator[tuple[str, nn.Parameter]], model: nn.Module, lr: float
) -> Optimizer:
    """The optimizer of :func:`resolve`'s options over ``named`` parameters of copies of ``model``."""
    options = {key: value for key, value in resolved.items() if key != "kind"}
    options["betas"] = tuple(options["betas"])
    params: Any = list(named)
    if resolved["kind"] != "AdamW":
        attention = next(module for module in model.modules() if hasattr(module, "n_query_groups"))
        heads = {"n_head": attention.n_head, "n_query_groups": attention.n_query_groups}
        params = [{"params": params, **heads}]
    return KINDS[resolved["kind"]](params, lr=lr, weight_decay=DECAY, **options)


class Trial(AdaPM):
    """AdaPM with another low-rank momentum.

    Args:
        low_rank: fields of :class:`LowRankMomentum` that differ, for instance ``{"flush": False}``.
        divide_all: Adam's bias correction of the whole direction, as published, not of the average alone.
        slow_beta1: a second low-rank momentum with this decay beside the first; their mean is used.
    """

    def __init__(
        self,
        params: Any,
        *,
        low_rank: Mapping[str, Any] | None = None,
        divide_all: bool = False,
        slow_beta1: float | None = None,
        **options: Any,
    ) -> None:
        self.low_rank, self.divide_all, self.slow_beta1 = dict(low_rank or {}), divide_all, slow_beta1
        super().__init__(params, **options)

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        momentum = super().momentum_for(piece, shape, group)
        if not isinstance(momentum, LowRankMomentum):
            return momentum
        momentum = dataclasses.replace(momentum, **self.low_rank)
        if self.divide_all:
            return DivideAll(**dataclasses.asdict(momentum))
        if self.slow_beta1 is not None:
            return TwoTimeScales(momentum, dataclasses.replace(momentum, beta1=self.slow_beta1))
        return momentum


@dataclass(frozen=True)
class DivideAll(LowRankMomentum):
    """The published form: the whole direction, not only the average in it, is divided by ``1 - beta1**step``."""

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        # a step so late that nothing is left to correct, in the same phase of the refresh
        late = step + 10_000 * self.update_proj_gap
        used = super().direction(grads, states, late, reduction)
        return used._replace(scale=used.scale / (1 - self.beta1**step))


@dataclass(frozen=True)
class TwoTimeScales:
    """The mean of two low-rank momenta, each with factors of its own."""

    fast: LowRankMomentum
    slow: LowRankMomentum
    name: ClassVar[str] = "low_rank"

    def due(self, step: int) -> bool:
        return self.fast.due(step)

    def make(self, shape: torch.Size, like: Tensor) -> dict[str, Any]:
        made = {"fast.": self.fast.make(shape, like), "slow.": self.slow.make(shape, like)}
        return {prefix + key: value for prefix, state in made.items() for key, value in state.items()}

    def direction(
        self, grads: list[Tensor], states: Sequence[State], step: int, reduction: Reduction = ONE_PROCESS
    ) -> Direction:
        fast, slow = (
            momentum.direction(
                grads,
                [PieceState(state, prefix) for state in states],  # type: ignore[arg-type]
                step,
                reduction,
            )
            for prefix, momentum in (("fast.", self.fast), ("slow.", self.slow))
        )
        both = torch._foreach_add(fast.multiplied().tensors, slow.multiplied().tensors)
        return Direction(list(both), 0.5 * fast.scale, scratch=True, clamp=fast.clamp)


KINDS: dict[str, Callable[..., Optimizer]] = {"AdamW": torch.optim.AdamW, "AdaPM": AdaPM, "trial": Trial}
