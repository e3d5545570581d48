"""How the elements of a parameter are divided among processes."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """Which elements of a parameter each process of a group holds.

    Args:
        shape: of the whole parameter.
        spans: first element and the one after the last, for each process of the group.
        rank: this process, in the group.
        group: the processes that hold the parameter together.
        mesh: of the parameter, where it is a DTensor.
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
