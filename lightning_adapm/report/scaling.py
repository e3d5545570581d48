"""Computed cost of AdaPM's momentum on many processes: bytes kept and bytes exchanged, from shapes alone."""

from typing import NamedTuple

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
    momentum, adamw, step, refresh, gradients, size = 0.0, 0.0, 0, 0, 0, 4
    shared = basis == "shard"
    parts = (part for group in optimizer.param_groups for param in group["params"] for part in optimizer.parts(param))
    for part in parts:
        gradients += size * part.shape.numel()
        adamw += size * part.shape.numel() / world_size
        step += size  # whether the gradient is finite
        for entry in part.first.entries(part.shape).values():
            if entry.shape is None:
                continue
            if not (entry.columns and part.first.has_basis and len(part.shape) == 2):
                momentum += size * entry.shape.numel() / world_size
                continue
            rank, n = entry.shape
            kept = -(-n // world_size) if shared else n
            momentum += size * rank * kept
            refresh += size * (rank * n + rank * rank + 2 * rank)
            if shared:
                stored = entry.storage.dtype
                step += (size if stored is None else stored.itemsize) * rank * world_size * kept
                # made orthonormal by parts: two sums of products in float64, and the parts put together
                refresh += size * (4 * rank * rank + rank * world_size * kept)
    return Scaling(world_size, basis, momentum, adamw, step, refresh, gradients)
