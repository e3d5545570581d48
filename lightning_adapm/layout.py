"""Which elements of a parameter this process holds, found from what the tensor is: a DTensor, or a view of FSDP1's."""

import gc
import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.distributed.fsdp._flat_param import FlatParameter, FlatParamHandle
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.weak import WeakIdKeyDictionary


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


def layout_of(param: Tensor) -> Layout | None:
    """Who holds which elements of a parameter; None for what every process holds whole.

    Raises:
        TypeError: a parameter that is sharded otherwise than by rows or in FSDP1's flat way.
    """
    if isinstance(param, FlatParameter):
        raise TypeError("AdaPM needs each parameter, not FSDP's flat one: wrap the model with use_orig_params=True")
    if isinstance(param, DTensor):
        return _layout_of_dtensor(param)
    return _layout_of_view(param) if _is_fsdp_flattened(param) else None


def shape_of(param: Tensor) -> torch.Size:
    """The shape of the whole parameter, whatever this process holds of it."""
    layout = layout_of(param)
    return param.shape if layout is None else layout.shape


def _layout_of_dtensor(param: DTensor) -> Layout:
    mesh, sharded = param.device_mesh, [dim for dim, kind in enumerate(param.placements) if kind != Replicate()]
    if [param.placements[dim] for dim in sharded] not in ([], [Shard(0)]):
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} has the placements {param.placements}; AdaPM works on"
            " parameters sharded along their first dimension, as fully_shard does by default. Tensor parallelism"
            " (tensor_parallel_size > 1) and shard_placement_fn are not supported"
        )
    dim = sharded[0] if sharded else 0
    count, rank = (mesh.size(dim), mesh.get_local_rank(dim)) if sharded else (1, 0)
    rows, inner = (param.shape[0], param.shape[1:].numel()) if param.dim() else (1, 1)
    edges = [min(-(-rows // count) * index, rows) * inner for index in range(count + 1)]
    return Layout(param.shape, tuple(pairwise(edges)), rank, mesh.get_group(dim), mesh)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


_VIEWS: MutableMapping[Tensor, "weakref.ref[FlatParamHandle]"] = WeakIdKeyDictionary()
"""FSDP1's handle for each parameter that is a view into a flat one."""


def _layout_of_view(param: Tensor) -> Layout | None:
    handle = _VIEWS[param]() if param in _VIEWS else None
    if handle is None:
        _find_views()
        handle = _VIEWS[param]() if param in _VIEWS else None
    if handle is None or not handle.uses_sharded_strategy:
        return None
    flat = handle.flat_param
    index = next(i for i, view in enumerate(flat._params or ()) if view is param)
    ends = list(accumulate(flat._numels_with_padding))
    last = [end for end, padding in zip(ends, flat._is_padding_mask, strict=True) if not padding][index]
    numel = flat._numels[index]
    size = flat._sharded_size.numel()
    edges = [min(max(size * rank - (last - numel), 0), numel) for rank in range(handle.world_size + 1)]
    return Layout(flat._shapes[index], tuple(pairwise(edges)), handle.rank, handle.process_group)


def _find_views() -> None:
    """Look for all handles there are: nothing leads from a view, which is all that an optimizer has, to its own."""
    for handle in gc.get_objects():
        if type(handle) is FlatParamHandle and handle.flat_param._params is not None:
            for view in handle.flat_param._params:
                _VIEWS[view] = weakref.ref(handle)
