"""The path of a bucket of parts through a step, by kernels or by torch's operations; decided only here."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adapm.moments.first import FullMomentum, LowRankMomentum, NoMomentum
from lightning_adapm.moments.nesterov import NesterovLowRankMomentum, NesterovMomentum
from lightning_adapm.moments.orthogonal import Orthogonal
from lightning_adapm.moments.quantized import EightBits
from lightning_adapm.moments.regression import LowRankRegression, LowRankSecondMoment
from lightning_adapm.moments.second import (
    BlockSecondMoment,
    ElementwiseSecondMoment,
    FactoredSecondMoment,
    NoSecondMoment,
    RelativeSecondMoment,
)
from lightning_adapm.moments.storage import EXACT
from lightning_adapm.sharding.find import has_values
from lightning_adapm.step import kernels, loops
from lightning_adapm.step.launch import DTYPES
from lightning_adapm.step.parts import Part

_SECOND_MOMENTS = (
    NoSecondMoment,
    ElementwiseSecondMoment,
    BlockSecondMoment,
    FactoredSecondMoment,
    RelativeSecondMoment,
    Orthogonal,
)
_IN_LOOPS = (NoSecondMoment, ElementwiseSecondMoment, BlockSecondMoment, FactoredSecondMoment)


class Path(NamedTuple):
    """The path of a bucket through a step: ``name`` is a row of the table in docs/distributed.md."""

    name: str
    reason: str

    @property
    def kernels(self) -> bool:
        """Whether kernels read gradients as they are; otherwise these are copied in the dtype of the arithmetic."""
        return self.name in ("kernels", "kernels and reductions")

    @property
    def whole(self) -> bool:
        """Whether kernels do all of the step; otherwise moments and reductions do a part of it."""
        return self.name == "kernels"

    @property
    def moved_by_kernels(self) -> bool:
        """Whether kernels move the parameters, however their direction was computed."""
        return self.kernels or self.name == "torch and kernels"

    @property
    def loops(self) -> bool:
        """Whether compiled loops move the parameters, on a CPU."""
        return self.name == "torch and loops"


class StepPath(NamedTuple):
    """A row of :meth:`lightning_adapm.optim.base.RoleOptimizer.step_paths`."""

    shape: tuple[int, ...]
    """Shape of the matrices, over all processes."""
    number: int
    """Number of matrices or stacks of this shape that step together."""
    roles: tuple[str, ...]
    path: str
    """``"kernels"``, ``"kernels and reductions"``, ``"torch and kernels"``, ``"torch and loops"`` or ``"torch"``."""
    reason: str
    """Why it is not ``"kernels"``; empty where it is."""
    launches: str = ""
    """``"replayed"`` where steps are replayed as CUDA graphs; else why not."""


def path_of(parts: Sequence[Part], grads: Sequence[Tensor], maximize: bool) -> Path:
    """Decide the path of parts that are alike.

    Args:
        parts: The parts.
        grads: Their gradients as matrices; of sharded parameters, everything that this process holds.
        maximize: Whether gradients are negated.
    """
    part = parts[0]
    device = part.view.device
    if not kernels.runs_on(device):
        return _without_kernels(parts, grads)
    if reason := _unknown_layout(parts, grads):
        return Path("torch", reason)
    if maximize:
        return Path("torch and kernels", "maximize=True negates gradients")
    if reason := unknown_moments(part):
        return Path("torch and kernels", reason)
    reason = _needs_reductions(parts)
    return Path("kernels and reductions" if reason else "kernels", reason)


def _without_kernels(parts: Sequence[Part], grads: Sequence[Tensor]) -> Path:
    device = parts[0].view.device
    reason = f"no kernels on {device.type}"
    if not loops.runs_on(device):
        return Path("torch", reason)
    unknown = _unknown_to_loops(parts, grads)
    return Path("torch", f"{reason}, {unknown}") if unknown else Path("torch and loops", reason)


def _unknown_to_loops(parts: Sequence[Part], grads: Sequence[Tensor]) -> str:
    """Reason why compiled loops cannot move parts along gradients; empty where they can."""
    part = parts[0]
    first, second = part.first, part.second
    if len(part.shape) < 2:
        return "no loops for vectors"
    if part.shard is not None:  # rows are taken out of what this process holds later, without gaps
        fit = has_values(part.view) and part.view.dtype == torch.float32 and not part.piece.transposed
    else:
        fit = all(loops.movable(each.view, grad) for each, grad in zip(parts, grads, strict=True))
    if not fit:
        return "no loops for this dtype or memory layout"
    if type(first) not in (NoMomentum, FullMomentum, LowRankMomentum) or type(second) not in _IN_LOOPS:
        return f"no loops for {type(first).__name__} with {type(second).__name__}"
    if isinstance(first, LowRankMomentum) and not first.debias:
        return "no loops for low-rank momentum without its residual"
    if isinstance(second, BlockSecondMoment) and second.outputs != -2:
        return "no loops for blocks of columns"
    if isinstance(first, FullMomentum) and first.storage not in (EXACT, EightBits()):
        return f"no loops for momentum in {first.storage}"
    if isinstance(second, ElementwiseSecondMoment) and second.storage != EXACT:
        return f"no loops for second moments in {second.storage}"
    return ""


def _needs_reductions(parts: Sequence[Part]) -> str:
    """Reason why kernels alone cannot move parts, the same on all processes; empty where they can."""
    part = parts[0]
    if isinstance(part.first, LowRankMomentum) and not all(part.get("seeded") for part in parts):
        return "the first basis is still to be found"
    if part.shard is None:
        return ""
    shards = [each.shard for each in parts if each.shard is not None]
    if any(shard.cut for shard in shards):
        return "processes share rows"
    if len({shard.counts for shard in shards}) > 1:
        return "processes hold different numbers of rows of these parts"
    if type(part.second) is RelativeSecondMoment:
        return f"processes share the sums of {type(part.second).__name__}"
    return ""


def _unknown_layout(parts: Sequence[Part], grads: Sequence[Tensor]) -> str:
    """Reason why kernels cannot move parts along gradients of this layout; empty where they can."""
    views, shard = [part.view for part in parts], parts[0].shard
    if shard is None:
        return "" if kernels.movable(views, grads) else "no kernels for this dtype or memory layout"
    # rows are taken out of what this process holds later, without gaps
    known = views[0].dtype in DTYPES and grads[0].dtype in DTYPES and has_values(views[0])
    if not known or shard.interleaved or parts[0].shape[-1] > kernels.MOST_COLUMNS:
        return "no kernels for this dtype or memory layout"
    if not _needs_reductions(parts):
        return ""
    if not views[0].numel():
        return "this process holds nothing"
    if len({part.held_shape for part in parts}) > 1:
        return "processes hold different numbers of rows of these parts"
    if parts[0].second.whole_matrices and shard.cut:
        return "processes share rows of matrices that are orthogonalized"
    return ""


def unknown_moments(part: Part) -> str:
    """Reason why kernels cannot compute the moments of a part; empty where they can."""
    first, second = part.first, part.second
    if type(first) is LowRankRegression and type(second) is LowRankSecondMoment:
        return _unknown_regression(part)
    known = (NesterovMomentum, NesterovLowRankMomentum) if second.whole_matrices else ()
    if type(first) not in (NoMomentum, FullMomentum, LowRankMomentum, *known):
        return f"no kernels for {type(first).__name__}"
    if isinstance(first, LowRankMomentum) and not first.debias:
        return "no kernels for low-rank momentum without its residual"
    if type(second) not in _SECOND_MOMENTS:
        return f"no kernels for {type(second).__name__}"
    if isinstance(second, BlockSecondMoment) and second.outputs != -2:
        return "no kernels for blocks of columns"
    momentum = first.entries(part.shape)
    for key, entry in part.entries.items():
        storage = entry.storage
        if type(storage) is EightBits and key in momentum:
            continue
        if not storage.plain or (storage.dtype is not None and storage.dtype not in DTYPES):
            return f"no kernels for state in {storage}"
    return ""


def _unknown_regression(part: Part) -> str:
    """Reason why kernels cannot fit the factors of a part, whatever their storage; empty where they can."""
    assert isinstance(part.first, LowRankRegression)
    if part.first.order != "gauss_seidel":
        return f"no kernels for order={part.first.order!r}"
    return "no kernels for regressions on rows that processes share" if part.shard is not None else ""
