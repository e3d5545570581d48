"""PartialMuon: Muon's orthogonal updates with AdaPM's momentum by role."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_adapm.moments import policy
from lightning_adapm.moments.base import Momentum, SecondMoment
from lightning_adapm.moments.first import FullMomentum, LowRankMomentum, NoMomentum
from lightning_adapm.moments.nesterov import NesterovLowRankMomentum, NesterovMomentum
from lightning_adapm.moments.orthogonal import FAST, ITERATIONS, Iteration, Orthogonal, iteration_of
from lightning_adapm.optim import options
from lightning_adapm.optim.base import RoleOptimizer
from lightning_adapm.roles.piece import Piece
from lightning_adapm.state.settings import AS_BUILT

HIDDEN = ("query", "key", "value", "attn_out", "mlp")
"""Roles whose matrices are moved by orthogonal updates."""

DEFAULT_MOMENTUM: Mapping[str, str] = {**policy.PAPER_MOMENTUM, "embedding": "full", "lm_head": "full"}
DEFAULT_RANK = 0.15
"""More than AdaPM's: the loss goes on falling with the rank, and attention outputs keep no momentum."""

_SETTLED = 1000.0
"""Steps of a loaded Muon, which counts none: so many that its average has no bias left."""


def kind_of(group: Mapping[str, Any]) -> str:
    """Kind of iteration that ``newton_schulz="auto"`` means with the other options of a ``group``."""
    return "muon" if group["ns_steps"] is not None or policy.is_full(group) else "fast"


class PartialMuon(RoleOptimizer):
    """Muon whose momentum depends on the role: low-rank factors, all of it, or none, as in AdaPM (arXiv 2510.09103).

    Muon is that of ``torch.optim.Muon``, after Keller Jordan (https://kellerjordan.github.io/posts/muon/).

    Matrices of hidden layers (queries, keys, values, attention outputs and MLPs) move along the nearest orthogonal
    matrix to their momentum: queries, keys and values of a fused weight each by itself, experts of a stack likewise.
    Everything else takes Adam's update at the same learning rate. ``momentum="full"`` is Muon, with its five steps of
    Newton-Schulz and in float32.

    Args:
        params: Named parameters or parameter groups, as for :class:`~lightning_adapm.AdaPM`.
        lr: Learning rate of all parameters. An orthogonal update is multiplied by ``0.2 * sqrt(max(m, n))``, which
            gives it the size of Adam's.
        mu: Decay of the momentum of hidden matrices.
        nesterov: Whether the momentum looks one step ahead, as Muon's does.
        betas: Decay of the first and the second moment of everything else.
        eps: Constant added to the denominator of everything else, outside the root.
        weight_decay: Decoupled weight decay, as in AdamW.
        rank: Rank of low-rank momentum; see AdaPM.
        update_proj_gap: Steps between two refreshes of a subspace.
        momentum: Policies by role that differ from the default, one policy for every role, or a preset; see AdaPM. By
            default queries, keys and MLPs keep low-rank momentum, attention outputs none, everything else all of it.
        second_moment: Second moment for Adam's update: ``"block"``, ``"elementwise"`` or ``"factored"``.
        roles: Roles for names, as for AdaPM. A matrix with a policy instead of a role has Adam's update.
        unmatched: Policy of matrices without a known role, which have Adam's update; ``"error"`` refuses them.
        no_decay: Roles exempt from weight decay.
        state_dtype: Dtype of the momentum, as for AdaPM: by default, full momentum of matrices in eight bits and
            factors in bfloat16. With a preset or one policy for every role, full momentum is in float32.
        basis: Placement of bases, as for AdaPM.
        convolutions: Whether weights of convolutions have orthogonal updates, too, as matrices of outputs by the rest.
            Their names tell no role: give them one, such as ``roles={"conv": "mlp"}``.
        ns_steps: Steps of the Newton-Schulz iteration that finds the orthogonal matrix; ``None`` for 5 of Muon's, or 2
            that are fast.
        newton_schulz: ``"muon"``, any number of Muon's steps, or ``"fast"``, 2, 3 or 4 steps with fitted coefficients.
            Two are of higher degrees, and do what four do with fewer products; three are shorter, for a higher loss.
            ``"auto"`` is fast, but Muon's where every role keeps full momentum, so that this is Muon, and
            where only ``ns_steps`` is given.
        maximize: Whether the objective is maximized.
        rounding: How bfloat16 and float16 parameters are rounded, ``"stochastic"`` or ``"nearest"``, as for AdaPM.
        update_in_backward: Whether parameters move inside backward, as for AdaPM.

    Raises:
        ValueError: An option is out of range, or a matrix has no role.
        TypeError: Parameters lack names and roles, or are complex.

    State of a parameter whose matrix is ``(m, n)``; "float32" is float64 for float64 parameters. A fused weight has the
    entries per piece, for instance ``query.exp_avg_l``; a stack of matrices ``(b, m, n)`` has ``b`` in front of every
    shape.

    - ``step``: number of steps, a float32 scalar on the CPU.
    - ``exp_avg`` ``(m, n)``: full momentum, Muon's buffer, in ``state_dtype``: of vectors float32.
    - ``exp_avg_l`` ``(m, rank)``, ``exp_avg_r`` ``(rank, n)``, in ``state_dtype``, by default bfloat16, and the int
      ``seeded``: low-rank momentum, its orthonormal basis, and whether every matrix has a basis yet.
    - ``exp_avg_sq``, or ``exp_avg_sq_row`` and ``exp_avg_sq_col``, float32: second moment of what has Adam's update, as
      AdaPM's. Hidden matrices have none.
    - Where ``state_dtype`` is int8, by default for full momentum of matrices, codes and scales take the place of a
      momentum, as in AdaPM.

    Numerics: arithmetic is in float32, or float64 for float64 parameters, whatever the dtype of parameters and state.
    The products of the Newton-Schulz iteration are in bfloat16 where the device has instructions for it, on CUDA from
    compute capability 8.0, else in float32; in float64 for float64 parameters. On CUDA, kernels write the direction
    once, in float16 for fast steps, and compute half of each symmetric product. A momentum that is zero gives no
    update, and a gradient with an infinity or a NaN is taken as zero for the whole piece.

    Example::

        optimizer = PartialMuon(model.named_parameters(), lr=2e-3)
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    """

    structure = ("rank", "second_moment", "momentum", "state_dtype", "basis", "convolutions")
    automatic: ClassVar[options.Automatic] = {"state_dtype": policy.state_dtype_of, "newton_schulz": kind_of}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        mu: float = 0.95,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        rank: int | float = DEFAULT_RANK,
        update_proj_gap: int = 10,
        momentum: Mapping[str, str] | str | None = None,
        second_moment: str = "block",
        roles: Mapping[str, str] | None = None,
        unmatched: str = "error",
        no_decay: Iterable[str] = (),
        state_dtype: options.StateDtype = options.AUTO,
        basis: str = "auto",
        convolutions: bool = False,
        ns_steps: int | None = None,
        newton_schulz: str = options.AUTO,
        maximize: bool = False,
        rounding: str = "stochastic",
        update_in_backward: bool = False,
        **left_over: Any,
    ) -> None:
        options.check_roles(roles, unmatched)
        if isinstance(momentum, Mapping | None):
            momentum = {**DEFAULT_MOMENTUM, **(momentum or {})}
        table = policy.momentum_table(momentum, unmatched)
        super().__init__(
            params,
            {
                "lr": lr,
                "mu": mu,
                "nesterov": nesterov,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "rank": rank,
                "update_proj_gap": update_proj_gap,
                "second_moment": second_moment,
                "momentum": table,
                "no_decay": no_decay,
                "state_dtype": state_dtype,
                "basis": basis,
                "convolutions": convolutions,
                "ns_steps": ns_steps,
                "newton_schulz": newton_schulz,
                "clip_threshold": 1.0,  # of what takes Adam's update without full momentum, as in AdaPM
                "maximize": maximize,
                "rounding": rounding,
            },
            roles=roles,
            unmatched=unmatched,
            update_in_backward=update_in_backward,
            left_over=left_over,
            roles_matter=len(set(table.values())) > 1,
        )

    def filled(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the options that a group does not state; the number of steps is that of its Newton-Schulz."""
        found = super().filled(group)
        return {**found, "ns_steps": steps_of(found["newton_schulz"], found["ns_steps"])}

    def check_options(self, group: Mapping[str, Any]) -> None:
        """Refuse options of a parameter group that are out of range."""
        super().check_options(group)
        options.check_option(group, "mu", "a number in [0, 1)", lambda mu: 0 <= mu < 1)
        options.check_option(
            group, "newton_schulz", f"one of {options.AUTO}, {', '.join(ITERATIONS)}", ITERATIONS.__contains__
        )
        if group["ns_steps"] is not None:  # as in the defaults, for the number of the group's kind
            options.check_option(group, "ns_steps", *options.COUNT)
            _iteration(group)

    def momentum_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> Momentum:
        """Choose the momentum of a piece by its role. With ``nesterov``, that of hidden matrices looks ahead."""
        if not is_orthogonal(piece, shape, group):
            return policy.momentum_for(piece, shape, group)
        mu = group["mu"]
        found = policy.momentum_for(piece, shape, {**group, "betas": (mu, 0.0)})
        if isinstance(found, NoMomentum) or not group["nesterov"]:
            return found
        assert isinstance(found, FullMomentum | LowRankMomentum)
        ahead = NesterovLowRankMomentum if isinstance(found, LowRankMomentum) else NesterovMomentum
        return ahead(**{field.name: getattr(found, field.name) for field in fields(found)})

    def as_own(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Take a state of ``torch.optim.Muon`` as well, whose buffers become the momentum.

        The learning rate of a Muon without ``adjust_lr_fn="match_rms_adamw"`` has another meaning: this one's stays.
        Steps of Newton-Schulz that were saved without their kind are Muon's.
        """
        found = from_muon(saved)
        return {**found, "param_groups": [_with_kind(group) for group in found["param_groups"]]}

    def second_moment_for(self, piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> SecondMoment:
        """Choose orthogonal updates for hidden matrices, the option ``second_moment`` for everything else."""
        if is_orthogonal(piece, shape, group):
            return Orthogonal(_iteration(group))
        return policy.second_moment_for(piece, shape, group)


def steps_of(kind: str, steps: int | None) -> int | None:
    """Option ``ns_steps`` for a kind of Newton-Schulz, whose number of steps stands for None."""
    return ITERATIONS.get(kind) if steps is None else steps


def from_muon(saved: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the groups of ``torch.optim.Muon`` as PartialMuon would have saved them."""
    state, groups = dict(saved["state"]), []
    for group in saved["param_groups"]:
        if "ns_coefficients" in group:
            adamws_size = group["adjust_lr_fn"] == "match_rms_adamw"
            dropped = {"momentum", "eps", "ns_coefficients", "adjust_lr_fn"}
            dropped |= set() if adamws_size else {"lr", "initial_lr"}
            for key in group["params"]:
                if key in state:
                    state[key] = {"step": torch.tensor(_SETTLED), "exp_avg": state[key]["momentum_buffer"]}
            group = {"mu": group["momentum"], **{key: value for key, value in group.items() if key not in dropped}}
        groups.append(group)
    return {**saved, "state": state, "param_groups": groups}


def _with_kind(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group that says which kind of Newton-Schulz its steps are, as given in code as well."""
    kind = {"newton_schulz": "muon"} if "ns_steps" in group else {}
    built = {AS_BUILT: {**kind, **group[AS_BUILT]}} if AS_BUILT in group else {}
    return {**kind, **group, **built}


def _iteration(group: Mapping[str, Any]) -> Iteration:
    """Iteration that the options of a group mean.

    Raises:
        ValueError: There are no so many fast steps.
    """
    if group["newton_schulz"] == "fast":
        few = "2, 3 or 4"
        options.check_option(group, "ns_steps", f"{few} with newton_schulz='fast'", FAST.__contains__)
    return iteration_of(group["newton_schulz"], group["ns_steps"])


def is_orthogonal(piece: Piece, shape: torch.Size, group: Mapping[str, Any]) -> bool:
    """Whether a piece whose matrix has ``shape`` is moved by orthogonal updates."""
    convolution = piece.flat and (piece.dim > 3 or piece.role == "mlp")  # attention's heads and head size are flat, too
    return piece.role in HIDDEN and len(shape) >= 2 and (group["convolutions"] or not convolution)
