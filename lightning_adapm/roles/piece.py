"""Roles, and the pieces of a parameter, which have one role each."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROLES = ("embedding", "query", "key", "value", "attn_out", "mlp", "lm_head", "norm", "bias", "adapter")
"""Roles of pieces."""

UNMATCHED = "unmatched"
"""Stands for the role of a matrix whose role is not known."""

POLICIES = ("none", "low_rank", "full")
"""Momentum of a role, or of a matrix that has a policy instead of a role."""


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that has one role: the whole parameter, or some of the rows of a fused weight.

    The rows of a fused weight are cut into ``groups`` equal groups. The piece is the slice ``start`` to ``stop`` of
    each group.
    """

    role: str
    """One of :data:`ROLES`, a policy, or :data:`UNMATCHED`."""
    start: int = 0
    """First row in each group."""
    stop: int | None = None
    """Row after the last in each group; None for the whole parameter."""
    groups: int = 1
    """Number of groups, such as the query groups of interleaved heads."""
    heads: int | None = None
    """Number of heads, which are equal blocks of the piece's rows; None where it is unknown."""
    flat: bool = False
    """Whether all dimensions but the first are one, as in a convolution; else a third dimension stacks matrices."""
    transposed: bool = False
    """Whether outputs are columns, as in Hugging Face's ``Conv1D``; rows in this description are columns then."""
    dim: int = 2
    """Number of dimensions of the parameter when its role was found."""
    block: int = 0
    """Number of the transformer block around the parameter; 0 outside."""
    part: str = ""
    """Name that distinguishes pieces of one role, such as a fused gate and up projection."""

    @property
    def whole(self) -> bool:
        """Whether the piece is the whole parameter."""
        return self.stop is None

    @property
    def prefix(self) -> str:
        """Prefix of this piece's keys in the optimizer's state."""
        return "" if self.whole else f"{self.part or self.role}."

    def view(self, tensor: Tensor) -> Tensor:
        """View of this piece in a tensor of the parameter's shape."""
        if self.stop is None:
            return tensor
        axis, length = int(self.transposed), self.stop - self.start
        if self.groups == 1:
            return tensor.narrow(axis, self.start, length)
        return tensor.unflatten(axis, (self.groups, -1)).narrow(axis + 1, self.start, length)

    def shape(self, whole: torch.Size) -> torch.Size:
        """Shape of the :meth:`matrix` of a parameter of shape ``whole``."""
        return self.matrix(torch.empty(whole, device="meta")).shape

    def matrix(self, tensor: Tensor) -> Tensor:
        """View of this piece as a matrix ``(m, n)`` or a stack ``(b, m, n)``; a vector is returned unchanged."""
        if self.stop is None:
            return tensor.flatten(1) if self.flat else tensor
        view = self.view(tensor)
        if self.flat:
            return view.flatten(1)
        axis = int(self.transposed)
        return view.flatten(axis, axis + 1) if self.groups > 1 else view


def as_one_matrix(shape: torch.Size) -> torch.Size:
    """Reduce the shape of a stack of one matrix, or of a vector with three dimensions, to a matrix's."""
    if len(shape) == 3 and (shape[0] == 1 or shape[1] == shape[2] == 1):
        return torch.Size((shape[0] * shape[1], shape[2]))
    return shape
