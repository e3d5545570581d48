"""Find which elements of a parameter each process holds: for DTensors, and for views of FSDP1."""

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_adapm.sharding import fsdp1
from lightning_adapm.sharding.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: object) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor. Does not import the module of DTensors, which takes most of a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def layout_of(param: Tensor, name: str = "a parameter") -> Layout | None:
    """Find which elements of a parameter each process holds; errors mention its ``name``.

    Returns:
        The layout, or None where every process holds the whole parameter.

    Raises:
        TypeError: The parameter is neither sharded by rows nor a view of FSDP1's flat one.
    """
    if fsdp1.is_flat_parameter(param):
        raise TypeError("params holds FSDP's flat parameter, not the model's: wrap the model with use_orig_params=True")
    if is_dtensor(param):
        return _layout_of_dtensor(param, name)
    return fsdp1.layout_of_view(param)


def shape_of(param: Tensor, name: str = "a parameter") -> torch.Size:
    """Shape of the whole parameter, however little of it this process holds; errors mention its ``name``."""
    layout = layout_of(param, name)
    return param.shape if layout is None else layout.shape


def _layout_of_dtensor(param: "DTensor", name: str) -> Layout:
    from torch.distributed.tensor import Replicate, Shard

    mesh, sharded = param.device_mesh, [dim for dim, kind in enumerate(param.placements) if kind != Replicate()]
    if [param.placements[dim] for dim in sharded] not in ([], [Shard(0)]):
        raise TypeError(
            f"{name} of shape {tuple(param.shape)} has the placements {param.placements}, but must be sharded along"
            " its first dimension alone, as fully_shard and ColwiseParallel do by default. RowwiseParallel of a linear"
            " layer, tensor_parallel_size > 1 together with fully_shard, and shard_placement_fn are not supported"
        )
    dim = sharded[0] if sharded else 0
    count, rank = (mesh.size(dim), mesh.get_local_rank(dim)) if sharded else (1, 0)
    rows, inner = (param.shape[0], param.shape[1:].numel()) if param.dim() else (1, 1)
    edges = [min(-(-rows // count) * index, rows) * inner for index in range(count + 1)]
    return Layout(param.shape, tuple(pairwise(edges)), rank, mesh.get_group(dim), mesh)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has values: those on the meta device and under ``FakeTensorMode`` only stand for some."""
    return tensor.device.type != "meta" and not isinstance(tensor, FakeTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def locals_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """This process's parts of tensors. Where none is a DTensor, the tensors are not looked at one by one."""
    return list(map(local, tensors)) if _has_dtensors(tensors) else tensors


def local_grads(grads: Sequence[Tensor], params: Sequence[Tensor]) -> Sequence[Tensor]:
    """This process's parts of gradients, sharded as their parameters.

    Tensor parallelism leaves some gradients in other forms: whole on every process, or as partial sums.
    """
    if not _has_dtensors(grads):
        return grads
    return [local(_sharded_alike(grad, param)) for grad, param in zip(grads, params, strict=True)]


def _sharded_alike(grad: Tensor, param: Tensor) -> Tensor:
    if not is_dtensor(grad) or not is_dtensor(param) or grad.placements == param.placements:
        return grad
    return grad.redistribute(placements=param.placements)


def _has_dtensors(tensors: Sequence[Tensor]) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(kind, module.DTensor) for kind in set(map(type, tensors)))
