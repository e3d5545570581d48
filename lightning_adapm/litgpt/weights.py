"""Weights on their way from a litgpt checkpoint to training: mapped from the file, and copied once, to their place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_adapm.litgpt.reading import Read, placed
from lightning_adapm.sharding.find import layout_of, local


@contextmanager
def parameters_without_values() -> Iterator[None]:
    """Within the context, modules get their parameters on the meta device, so that nothing initializes them.

    Buffers, which checkpoints lack, and LoRA's matrices are made as ever.
    """

    def without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or name.startswith("lora_"):
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(without_values)  # type: ignore[arg-type]  # torch says None
    try:
        yield
    finally:
        handle.remove()


def map_weights(path: Path) -> dict[str, Tensor]:
    """Map a checkpoint's weights into memory; what is not used is not read."""
    saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return dict(saved.get("model", saved))  # `litgpt pretrain` and `finetune_full` save the model with more around it


def matching_weights(model: nn.Module, path: Path, tie_embeddings: bool) -> dict[str, Tensor]:
    """Map a checkpoint's weights, and check that the model has the same names and shapes.

    Raises:
        ValueError: Its parameters have other names or shapes.
    """
    saved = map_weights(path)
    own = {key.replace(".linear.", "."): value for key, value in model.state_dict().items() if "lora_" not in key}
    for name in (*own, *saved):
        if name == "lm_head.weight" and tie_embeddings:
            continue
        if _shape(own, name) != _shape(saved, name):
            raise ValueError(
                f"`checkpoint_dir`: {str(path)!r} is of another model: {name} has shape {_shape(saved, name)} there and"
                f" {_shape(own, name)} in this model; leave out `model_name` and `config` to use the checkpoint's own"
                " model_config.yaml, or give the fields of the checkpoint's model"
            )
    return saved


def attach_weights(model: nn.Module, path: Path, tie_embeddings: bool) -> None:
    """Make a checkpoint's weights, mapped from the file, the parameters of a model; LoRA's stay as they are.

    Raises:
        ValueError: The model's parameters have other names or shapes.
    """
    saved = matching_weights(model, path, tie_embeddings)
    if tie_embeddings:
        saved["lm_head.weight"] = saved["transformer.wte.weight"]
    model.load_state_dict(saved, strict=False, assign=True)


@torch.no_grad()
def place_weights(module: nn.Module, device: torch.device, dtype: torch.dtype, read: Read = placed) -> None:
    """Move a module's parameters to a device and a dtype, out of the file that they are mapped from."""
    params = list(module.parameters())
    for param, value in zip(params, read((param.data for param in params), device, dtype), strict=True):
        param.data = value


def place_later(
    model: nn.Module, device: torch.device, dtype: torch.dtype, read: Read = placed
) -> Callable[[nn.Module], None]:
    """Leave a model's weights in the file, and return a function that moves those of one of its modules.

    FSDP1 calls it, as ``param_init_fn``, for the modules that it is about to flatten.
    """
    weights = take_weights(model, dtype)
    waiting = {param: weights[name] for name, param in model.named_parameters()}
    known: dict[nn.Parameter, weakref.ref[nn.Parameter]] = {}  # tied ones come again, before they are flattened

    def place(module: nn.Module) -> None:
        for name, param in module.named_parameters(recurse=False):
            if param in waiting:
                (value,) = read([waiting.pop(param)], device, dtype)
                new = nn.Parameter(value, param.requires_grad)
                known[param] = weakref.ref(new)
                setattr(module, name, new)
            elif param in known:
                setattr(module, name, known[param]())

    return place


def take_weights(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Take a model's weights out, and leave parameters of a dtype on the meta device in their place."""
    taken = dict(model.named_parameters())
    empty = {param: torch.empty_like(param, device="meta", dtype=dtype) for param in taken.values()}
    _replace(model, {param: nn.Parameter(value, param.requires_grad) for param, value in empty.items()})
    return {name: param.detach() for name, param in taken.items()}


@torch.no_grad()
def give_shards(model: nn.Module, weights: Mapping[str, Tensor], read: Read = placed) -> None:
    """Give a sharded model on the meta device this process's share of whole weights; only the share is read.

    Args:
        model: Model of DTensors, as ``fully_shard`` leaves it.
        weights: The whole weights by the names of the model's parameters.
        read: How the share is read.
    """
    given: dict[nn.Parameter, nn.Parameter] = {}
    named = dict(model.named_parameters())
    first = next(iter(named.values()))
    assert isinstance(first, DTensor)
    device = torch.device(first.device_mesh.device_type)
    parts = read((_part(param, weights[name]) for name, param in named.items()), device, first.dtype)
    for param, part in zip(named.values(), parts, strict=True):
        assert isinstance(param, DTensor)
        shard = DTensor.from_local(
            part,
            param.device_mesh,
            param.placements,
            run_check=False,
            shape=param.shape,
            stride=param.stride(),
        )
        given[param] = nn.Parameter(shard, param.requires_grad)
    _replace(model, given)


def _part(param: Tensor, whole: Tensor) -> Tensor:
    """This process's share of a whole weight."""
    layout = layout_of(param)
    assert layout is not None
    return whole.flatten()[slice(*layout.held)].view(local(param).shape)


def _replace(model: nn.Module, new: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the place of a model's; tied ones stay tied."""
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is not None:
                setattr(module, name, new[param])


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(state[name].shape) if name in state else None
