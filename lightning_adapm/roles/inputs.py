"""What a caller may hand to an optimizer as ``params``, turned into named parameters with the module they came from."""

import gc
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

# FSDP1 has a named_parameters of its own
_GENERATORS = {
    nn.Module.parameters.__code__: False,
    nn.Module.named_parameters.__code__: True,
    FullyShardedDataParallel.named_parameters.__code__: True,
}


def source_module(params: Any) -> nn.Module | None:
    """The module whose ``parameters()`` or ``named_parameters()`` is this generator, not yet started; None otherwise.

    LightningCLI and litgpt hand an optimizer nothing but ``model.parameters()``. A generator that has not run still
    holds the arguments it was called with, so its module, and with it every name and head count, can be read exactly.
    """
    if not inspect.isgenerator(params) or params.gi_code not in _GENERATORS:
        return None
    if inspect.getgeneratorstate(params) != inspect.GEN_CREATED:
        return None
    module: nn.Module = _arguments(params)["self"]
    return module


def _arguments(generator: Any) -> dict[str, Any]:
    return dict(generator.gi_frame.f_locals)


def read_params(params: Any) -> tuple[list[Any], nn.Module | None]:
    """Named parameters and their module, or, where there are no names, the bare tensors and None.

    Args:
        params: ``module.parameters()``, ``module.named_parameters()``, an iterable of ``(name, tensor)``, of
            tensors, or one tensor.
    """
    if isinstance(params, nn.Module):
        raise TypeError("params is a module: pass its named_parameters() instead, AdaPM(model.named_parameters(), ...)")
    if isinstance(params, Found):
        return list(params), params.module
    module = source_module(params)
    if module is not None and not _GENERATORS[params.gi_code]:
        return list(module.named_parameters(recurse=_arguments(params)["recurse"])), module
    items: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    return items, module


class Found(list[tuple[str, Tensor]]):
    """Named parameters of a known module."""

    def __init__(self, items: Iterable[tuple[str, Tensor]], module: nn.Module) -> None:
        super().__init__(items)
        self.module = module


def name_tensors(params: Any, known: Mapping[str, Tensor]) -> Any:
    """Bare tensors with their names in the module that has the parameters ``known`` under theirs; else ``params``.

    Callbacks that unfreeze (Lightning's ``BaseFinetuning``, ``finetuning-scheduler``) add groups of bare tensors. The
    module is looked for among all there are, which is exact: it has to hold the very same tensors under the same names.
    """
    if isinstance(params, Tensor) or not isinstance(params, (list, tuple)):
        return params
    if not params or not all(isinstance(param, Tensor) for param in params):
        return params
    for module in gc.get_objects():
        if not issubclass(type(module), nn.Module):
            continue
        named = dict(module.named_parameters(remove_duplicate=False))
        names = {id(param): name for name, param in named.items()}
        if all(named.get(name) is param for name, param in known.items()) and all(id(p) in names for p in params):
            return Found([(names[id(param)], param) for param in params], module)
    return params


def read_groups(params: Any) -> list[dict[str, Any]]:
    """Parameter groups as ``torch.optim`` takes them, one if ``params`` is not already a list of groups."""
    if isinstance(params, (nn.Module, Tensor)) or source_module(params) is not None:
        return [{"params": params}]
    if not isinstance(params, Iterable):
        raise TypeError(
            f"params must be an iterable of named parameters or of parameter groups, but got {type(params)}"
        )
    items = list(params)
    if not items:
        raise ValueError("optimizer got an empty parameter list")
    return items if isinstance(items[0], dict) else [{"params": items}]
