"""Bytes of an optimizer's state and residuals of its low-rank momentum, without a Trainer."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adapm.moments import lowrank
from lightning_adapm.moments.batches import join
from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.report.orthogonality import Deviation
from lightning_adapm.report.plan import StateBytes, adamw_bytes, held_bytes, state_bytes
from lightning_adapm.roles.context import describe
from lightning_adapm.roles.find import find_role
from lightning_adapm.roles.fused import cut
from lightning_adapm.roles.piece import ROLES, Piece
from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.reduction import total
from lightning_adapm.step.parts import Part, parts_of, reduction_of
from lightning_adapm.step.watching import Tiles

OTHER = "other"
"""Role shown for parameters without a rule, and for those with a policy instead of a role."""

_SKETCH = 16
"""Number of rows and columns of a residual's sketch."""


def role_label(role: str) -> str:
    """Return ``role``, or :data:`OTHER` if it is no role."""
    return role if role in ROLES else OTHER


@dataclass(frozen=True)
class StateReport:
    """Bytes of optimizer state on this process by role, and of AdamW's state in float32."""

    by_role: Mapping[str, StateBytes]
    adamw: Mapping[str, StateBytes]

    @classmethod
    def measure(cls, optimizers: Iterable[Optimizer], module: nn.Module | None = None) -> "StateReport":
        """Measure the state that optimizers hold now.

        Args:
            optimizers: Any torch optimizers.
            module: Module that provides the roles of parameters of other packages' optimizers.
        """
        held: dict[str, StateBytes] = {}
        adamw: dict[str, StateBytes] = {}
        pieces = {} if module is None else _pieces_of(module)
        for optimizer in optimizers:
            rest = dict(optimizer.state)
            for param in (param for group in optimizer.param_groups for param in group["params"]):
                state = rest.pop(param, {})
                if not param.requires_grad and not state:
                    continue
                split = (
                    _held(optimizer.parts(param), state)
                    if isinstance(optimizer, RoleOptimizer)
                    else _split(param, state, pieces.get(param, (Piece(OTHER),)))
                )
                for role, ours, theirs in split:
                    held[role] = held.get(role, StateBytes()) + ours
                    adamw[role] = adamw.get(role, StateBytes()) + theirs
            if rest:  # state of parameters that the optimizer no longer has
                held[OTHER] = sum(map(state_bytes, rest.values()), held.get(OTHER, StateBytes()))
        order = [role for role in (*ROLES, OTHER) if role in held]
        return cls({role: held[role] for role in order}, {role: adamw.get(role, StateBytes()) for role in order})

    @property
    def total(self) -> StateBytes:
        """Bytes over all roles."""
        return sum(self.by_role.values(), StateBytes())

    @property
    def adamw_total(self) -> StateBytes:
        """AdamW's bytes over all roles, in float32."""
        return sum(self.adamw.values(), StateBytes())

    def figures(self) -> dict[str, int]:
        """All figures in bytes, under their names in the logs."""
        total = self.total
        figures = {
            "momentum_bytes": total.momentum,
            "second_moment_bytes": total.second_moment,
            "total_bytes": total.total,
            "adamw_bytes": self.adamw_total.total,
        }
        return figures | {f"total_bytes_by_role/{role}": held.total for role, held in self.by_role.items()}


def _pieces_of(module: nn.Module) -> dict[Tensor, tuple[Piece, ...]]:
    """Find every parameter's pieces; a fused weight with unknown rows is one piece without a role."""
    pieces: dict[Tensor, tuple[Piece, ...]] = {}
    for item in describe(module.named_parameters(), module):
        try:
            pieces[item.param] = cut(item, find_role(item)[0] or OTHER)
        except ValueError:
            pieces[item.param] = (Piece(OTHER),)
    return pieces


def _held(parts: Sequence[Part], state: Mapping[str, Any]) -> Iterator[tuple[str, StateBytes, StateBytes]]:
    """Role, bytes held and AdamW's bytes of every part of a parameter of one of the package's optimizers."""
    for index, (part, held) in enumerate(zip(parts, held_bytes(parts, state), strict=True)):
        adamw = adamw_bytes([torch.Size((part.held_numel,))])
        yield role_label(part.piece.role), held, StateBytes(adamw.momentum, adamw.second_moment, 0 if index else 4)


def _split(
    param: Tensor, state: Mapping[str, Any], pieces: Sequence[Piece]
) -> Iterator[tuple[str, StateBytes, StateBytes]]:
    """Role, bytes and AdamW's bytes of every piece of one parameter.

    Entries with a piece's prefix are that piece's. The others belong to the whole parameter: moments are divided by the
    pieces' sizes, and counters belong to the first piece.
    """
    own = [{k: v for k, v in state.items() if not p.whole and str(k).startswith(p.prefix)} for p in pieces]
    rest = state_bytes({k: v for k, v in state.items() if not any(k in entries for entries in own)})
    numels = [part.held_numel for part in parts_of(0, "", param, pieces)]
    start, total = 0, max(1, sum(numels))
    for piece, entries, numel in zip(pieces, own, numels, strict=True):
        stop = start + numel
        momentum, second_moment = (
            size * stop // total - size * start // total for size in (rest.momentum, rest.second_moment)
        )
        adamw = adamw_bytes([torch.Size((numel,))])
        first = piece is pieces[0]
        yield (
            role_label(piece.role),
            state_bytes(entries) + StateBytes(momentum, second_moment, rest.other if first else 0),
            StateBytes(adamw.momentum, adamw.second_moment, adamw.other if first else 0),
        )
        start = stop


class Reading(NamedTuple):
    """Figures of one piece in one step.

    ``figures`` have the names of :class:`ResidualProbe`. They are numbers once they have been read, and 0-dimensional
    tensors before. ``entries`` is the number of entries that ``clamped`` refers to.
    """

    name: str
    role: str
    entries: int
    figures: dict[str, Any]


@dataclass
class _Seen:
    """Sums over what a probe has seen of a piece in one step, on this process."""

    reading: Reading
    key: tuple[int, int]
    shared: Layout | None
    """Layout over the processes whose sums are still to be added; None where this one holds all of the piece."""
    largest: Tensor
    """Largest entry of updates."""
    clamped: Tensor
    """Number of entries beyond the bound."""
    direction: Tensor
    """Square of the direction's norm."""
    residual: tuple[Tensor, Tensor] | None = None
    """Square of the residual's norm, and its sketch; None without a basis."""
    deviation: Deviation | None = None
    """Deviation of the update from an orthogonal matrix; None where it is not orthogonalized."""


class ResidualProbe:
    """An observer for ``AdaPM.observer``, which measures residuals of the low-rank momentum and sizes of updates.

    Figures of a piece (a stack of experts is one piece), none of them with a unit:

    - ``update_max``: largest entry of ``|update| / lr``, before any clamp;
    - ``clamped``: share of its entries beyond ``clip_threshold``, where there is one;
    - ``norm``: ``‖G - G RᵀR‖_F / ‖M^‖_F``, where there is a basis ``R``; ``M^`` is the direction used;
    - ``orthogonality``: ``‖U Uᵀ - I‖_F / sqrt(m)`` of an orthogonal update ``U``, on its smaller side ``m``; see
      :class:`~lightning_adapm.report.orthogonality.Deviation`;
    - ``stationarity``: cosine between the residual and the one observed before it, from sketches of them. The residual
      correction assumes that it is near 1.

    Between steps, it keeps a sketch of 256 numbers per piece. During a step, it holds tiles of gradients and updates,
    and until they are read at most 32 rows of each orthogonal update.
    Observing reads nothing back from the device; :meth:`read` does so once.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self._latest: dict[tuple[int, int], _Seen] = {}
        self._sketches: dict[tuple[int, int], Tensor] = {}

    def see_gradient(self, part: Part, grad: Tiles) -> None:
        """Begin a piece; see :class:`lightning_adapm.step.watching.Observer`."""
        nothing = torch.zeros((), dtype=part.exact, device=part.view.device)
        reading = Reading(part.name, role_label(part.piece.role), 0, {})
        seen = _Seen(reading, part.key, part.layout if part.is_shared else None, nothing, nothing, nothing)
        basis = part.first.basis(part)
        if basis is not None:
            basis = reduction_of([part]).columns(join([basis]), grad.shape[-1])
            seen.residual = _residual(part, grad, basis.to(part.exact))
        if part.second.whole_matrices and (part.shard is not None or part.held_numel):  # perhaps no matrix of a stack
            seen.deviation = Deviation(part)
        self._seen.append(seen)
        self._latest[part.key] = seen

    def see_update(self, part: Part, direction: Tensor, update: Tensor, clip_threshold: float | None) -> None:
        """Take in some rows of a piece; see :class:`lightning_adapm.step.watching.Observer`."""
        if not update.numel():
            return
        seen = self._latest[part.key]
        seen.largest = torch.maximum(seen.largest, update.abs().max())
        seen.direction = seen.direction + direction.square().sum()
        if seen.deviation is not None:
            seen.deviation.see(update)
        if clip_threshold is not None:
            seen.clamped = seen.clamped + (update.abs() > clip_threshold).sum()
            seen.reading = seen.reading._replace(entries=part.held_numel)

    def read(self) -> list[Reading]:
        """Return the readings since the last call; waits for the device. Call it on every process."""
        seen, self._seen, self._latest = self._seen, [], {}
        readings = [self._settled(each) for each in seen]
        tensors = [figure.float() for reading in readings for figure in reading.figures.values()]
        values = iter(torch.stack([t.to(tensors[0].device) for t in tensors]).tolist() if tensors else [])
        return [reading._replace(figures={name: next(values) for name in reading.figures}) for reading in readings]

    def _settled(self, seen: _Seen) -> Reading:
        """The figures of a piece, over all processes that hold parts of it."""
        figures = {"update_max": seen.largest}
        if seen.reading.entries:
            figures["clamped"] = seen.clamped / seen.reading.entries
        if seen.deviation is not None:
            figures["orthogonality"] = seen.deviation.settle()
        if seen.residual is not None:
            values = [seen.residual[0], seen.direction.clone(), seen.residual[1]]
            tiny = torch.finfo(seen.direction.dtype).tiny
            if seen.shared is not None:
                values = total(values, seen.shared.group)
            figures["norm"] = values[0].sqrt() / values[1].sqrt().clamp_min(tiny)
            now = values[2] / values[2].norm().clamp_min(tiny)
            if seen.key in self._sketches:
                figures["stationarity"] = (now * self._sketches[seen.key]).sum()
            self._sketches[seen.key] = now
        return seen.reading._replace(figures=figures)


def _residual(part: Part, grad: Tiles, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Square of the norm of ``G - G RᵀR``, and its :func:`sketch`, from tiles of rows."""
    projected = None
    if part.shard is not None and part.shard.cut:  # of cut rows, other processes have a part of the products
        products = [rows @ basis[which].mT for which, _, rows in grad]
        projected = reduction_of([part]).rows(torch.cat([basis.new_zeros(0, basis.shape[-2]), *products]).unsqueeze(0))
    square, sketched = basis.new_zeros(()), basis.new_zeros(_SKETCH, _SKETCH)
    above, height = _place(part)
    for which, first, rows in grad:
        product = rows @ basis[which].mT if projected is None else projected[which, first : first + len(rows)]
        unseen = torch.addmm(rows, product, basis[which], alpha=-1)
        if part.shard is not None:
            unseen = part.shard.held_only(unseen, first)
        square += unseen.square().sum()
        sketched += sketch(unseen, above + which * grad.shape[-2] + first, height)
    return square, sketched


def sketch(residual: Tensor, first: int = 0, rows: int | None = None) -> Tensor:
    """Project a stack of matrices ``(b, m, n)`` to 256 numbers, whose cosines approximate those of the residuals.

    The projection from both sides depends on the shape alone, and does not touch torch's random state.

    Args:
        residual: The whole stack, or some of its rows. The sketches of parts add up to the whole one.
        first: Index in the whole stack of the first row.
        rows: Number of rows of the whole stack, if these are not all.
    """
    tall = residual.reshape(-1, residual.shape[-1])
    m, n = tall.shape
    from_left = lowrank.starting_rows(_SKETCH, rows or max(1, m), tall, slice(first, first + m))
    from_right = lowrank.starting_rows(2 * _SKETCH, n, tall)[_SKETCH:]  # independent of the left one where m = n
    return from_left @ (tall @ from_right.mT)


def _place(part: Part) -> tuple[int, int]:
    """First row of this process, and the number of rows over all processes."""
    if part.shard is not None:
        return part.shard.first, part.shard.size
    if part.layout is None:
        return 0, max(1, part.shape[:-1].numel())
    width = part.layout.shape[-1]
    return part.layout.held[0] // width, part.layout.shape.numel() // width
