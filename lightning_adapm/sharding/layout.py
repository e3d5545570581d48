"""The division of a parameter's elements among processes."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """Spans of a parameter's elements held by each process of a group.

    Args:
        shape: Shape of the whole parameter.
        spans: First element and the one after the last, for each process of the group.
        rank: Rank of this process in the group.
        group: Processes that hold the parameter together.
        mesh: Device mesh of a DTensor; None for FSDP1.
    """

    shape: torch.Size
    spans: tuple[tuple[int, int], ...]
    rank: int
    group: dist.ProcessGroup
    mesh: DeviceMesh | None = None

    @property
    def held(self) -> tuple[int, int]:
        """This process's span."""
        return self.spans[self.rank]
