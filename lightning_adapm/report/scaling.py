"""Computed cost of AdaPM's momentum on many processes: bytes kept and bytes exchanged, from shapes alone."""

from typing import NamedTuple

from lightning_adapm.moments.first import LowRankMomentum
from lightning_adapm.optim import RoleOptimizer


class Scaling(NamedTuple):
    """Cost on one of ``world_size`` processes that shard parameters by rows, with the elementwise second moment."""

    world_size: int
    basis: str
    momentum: float
    """Bytes of momentum that the process keeps."""
    adamw: float
    """Bytes of AdamW's momentum, sharded the same way, in the same dtypes."""
    step: int
    """Bytes given to collectives, or received from them, in a step without a refresh."""
    refresh: int
    """Further bytes for a refresh of every basis, spread over ``update_proj_gap`` steps."""
    gradients: int
    """Bytes of all gradients in float32, which data parallelism exchanges in every step."""

    @property
    def saved(self) -> float:
        """Share of AdamW's momentum that AdaPM saves."""
        return 1 - self.momentum / self.adamw


def scaling(optimizer: RoleOptimizer, world_size: int, basis: str) -> Scaling:
    """Compute the cost of an optimizer if its parameters were sharded.

    Args:
        optimizer: Optimizer of unsharded parameters, for example on the meta device.
        world_size: Number of processes that would shard every parameter.
        basis: Where bases would be held, ``"replicate"`` or ``"shard"``.
    """
    momentum, adamw, step, refresh, gradients = 0.0, 0.0, 0, 0, 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            for part in optimizer.parts(param):
                kind, shape, size = part.first, part.shape, 4
                entries = kind.entries(shape)
                gradients += size * shape.numel()
                adamw += size * shape.numel() / world_size
                step += size  # whether the gradient is finite
                if isinstance(kind, LowRankMomentum) and len(shape) == 2:
                    rank, n = entries["exp_avg_r"].shape or (0, 0)
                    shared = basis == "shard"
                    momentum += size * (shape[0] * rank / world_size + rank * (-(-n // world_size) if shared else n))
                    step += size * rank * world_size * -(-n // world_size) if shared else 0
                    refresh += size * (rank * n + rank * rank + 2 * rank)
                    # made orthonormal by parts: two sums of products in float64, and the parts put together
                    refresh += size * (4 * rank * rank + rank * world_size * -(-n // world_size)) if shared else 0
                else:
                    whole = sum(entry.shape.numel() for entry in entries.values() if entry.shape is not None)
                    momentum += size * whole / world_size
    return Scaling(world_size, basis, momentum, adamw, step, refresh, gradients)
