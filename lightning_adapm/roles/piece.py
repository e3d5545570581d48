"""Roles, and the pieces of a parameter, which have one role each."""

from dataclasses import dataclass

import torch
from torch import Tensor

ROLES = ("embedding", "query", "key", "value", "attn_out", "mlp", "lm_head", "norm", "bias", "adapter")
"""Roles of pieces."""

UNMATCHED = "unmatched"
POLICIES = ("none", "low_rank", "full")


@dataclass(frozen=True)
class Piece:
    """The part of a parameter that has one role: all of it, or a slice ``start`` to ``stop`` of each of ``groups``
    equal groups of rows (of columns, where the weight is ``transposed``) of a fused weight.

    ``heads`` is how many equal row blocks it consists of, for Adam-mini's second moment, where that is known; ``flat``
    means that all dimensions but the first are one (a convolution); otherwise a third dimension is a stack of matrices.
    ``transposed`` means that outputs are columns (Hugging Face's ``Conv1D``); ``dim`` is how many dimensions the
    parameter had when its role was found; ``block`` is the number of the transformer block around it, 0 outside;
    ``part`` is its name where several pieces have one role (a fused gate and up projection).
    """

    role: str
    start: int = 0
    stop: int | None = None
    groups: int = 1
    heads: int | None = None
    flat: bool = False
    transposed: bool = False
    dim: int = 2
    block: int = 0
    part: str = ""

    @property
    def whole(self) -> bool:
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
        """View of this piece as a matrix or a stack of matrices; unchanged if it has fewer than two dimensions."""
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
