"""Layouts of FSDP1's parameters, and gradients of parameters of which a process holds no element.

FSDP1 has its layout in private attributes only, and this file is the one place that reads them. It does not import
FSDP1, which takes most of a second: whoever uses FSDP1 has imported it.
"""

import gc
import sys
import weakref
from collections.abc import MutableMapping, Sequence
from itertools import accumulate, pairwise
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lightning_adapm.sharding.collectives import all_reduce
from lightning_adapm.sharding.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.fsdp._flat_param import FlatParamHandle

_VIEWS: MutableMapping[Tensor, "weakref.ref[FlatParamHandle]"] = WeakIdKeyDictionary()
"""FSDP1's handle for each parameter that is a view of a flat one."""


def _fsdp1() -> Any:
    """The module of flat parameters; None before FSDP1 is imported."""
    return sys.modules.get("torch.distributed.fsdp._flat_param")


def is_flat_parameter(param: Tensor) -> bool:
    """Whether a tensor is a flat parameter of FSDP1, as ``use_orig_params=False`` exposes them."""
    return _fsdp1() is not None and isinstance(param, _fsdp1().FlatParameter)


def names_parameters(code: CodeType) -> bool:
    """Whether code is that of FSDP1's own ``named_parameters``."""
    if _fsdp1() is None:
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel

    return code is FullyShardedDataParallel.named_parameters.__code__


def layout_of_view(param: Tensor) -> Layout | None:
    """The layout of a parameter that is a view of a flat one; None for any other tensor."""
    if not getattr(param, "_fsdp_flattened", False):
        return None
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
    """Search memory for all handles, because an optimizer has views only, and a view has no reference to its handle."""
    for handle in gc.get_objects():
        if type(handle) is _fsdp1().FlatParamHandle and handle.flat_param._params is not None:
            for view in handle.flat_param._params:
                _VIEWS[view] = weakref.ref(handle)


def gradients(params: Sequence[Tensor], layouts: Sequence[Layout | None]) -> list[Tensor | None]:
    """Collect the gradient of every parameter, with zeros where only other processes have one.

    FSDP1 keeps no gradient where it keeps no element of a parameter, so its processes exchange who has one.
    """
    found = [param.grad for param in params]
    by_group: dict[dist.ProcessGroup, list[int]] = {}
    for index, layout in enumerate(layouts):
        if layout is not None and layout.mesh is None:
            by_group.setdefault(layout.group, []).append(index)
    for group, indices in by_group.items():
        there = torch.tensor([found[index] is not None for index in indices], dtype=torch.int32)
        there = there.to(params[indices[0]].device)
        all_reduce(there, group, dist.ReduceOp.MAX)
        for index, exists in zip(indices, there.tolist(), strict=True):
            if exists and found[index] is None:
                found[index] = torch.zeros_like(params[index])
    return found
