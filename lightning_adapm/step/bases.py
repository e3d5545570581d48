"""Bases that a refresh begins with, by :mod:`lightning_adapm.step.triton_bases`."""

import torch
from torch import Tensor

from lightning_adapm.moments import lowrank
from lightning_adapm.step import kernels
from lightning_adapm.step.launch import Matrices, launch

SKETCHED = 1024
"""Columns of a basis that a program copies at a time."""


def sketch(bases: Matrices) -> tuple[Tensor, Tensor]:
    """Bases as one tensor ``(b, r, n)`` in float32; and in the dtype of products with rows that are not zero, as
    :func:`lowrank.sketched`.
    """
    b, (r, n) = len(bases.addresses), bases.shape
    joined = bases.like.new_empty((b, r, n), dtype=torch.float32)
    sketched = torch.empty_like(joined, dtype=kernels.FACTOR)
    launch(
        "sketch",
        (r, b, 1),
        (bases, lowrank.kept_starting_rows(r, n, joined), joined, sketched),
        (r, n),
        (),
        BASIS=bases.dtype,
        FACTOR=kernels.FACTOR,
        BLOCK=min(SKETCHED, kernels.power_of_two(n)),
    )
    return joined, sketched
