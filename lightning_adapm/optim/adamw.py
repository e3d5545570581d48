"""States of this package's optimizers for ``torch.optim.AdamW``."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adapm.optim.adapm import AdaPM
from lightning_adapm.step.parts import Part

_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "maximize", "initial_lr")


def adamw_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert a state that an optimizer of this package has saved to one that ``torch.optim.AdamW`` loads.

    It is a hook, too: after ``optimizer.register_load_state_dict_pre_hook(adamw_state_dict)``, AdamW loads its own
    states and those of this package, also from the checkpoints of a Trainer.

    Learning rate, betas, eps and weight decay are the checkpoint's, as when AdaPM loads a state of AdamW. Momentum and
    second moments become tensors of the parameters' shapes: low-rank factors are multiplied, means are repeated, and
    what had no momentum begins with zeros.

    Args:
        optimizer: AdamW over the parameters that the state is of, in the same groups and order.
        state_dict: The saved state. One that is not of this package is returned as it is.

    Returns:
        The state for AdamW, with ``exp_avg`` and ``exp_avg_sq`` in the shape and the dtype of each parameter.

    Raises:
        ValueError: The state has no second moments, as of PartialMuon's matrices, or parameters are sharded.

    Example::

        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.load_state_dict(adamw_state_dict(optimizer, adapm.state_dict()))
    """
    saved = state_dict["param_groups"]
    if not any("format_version" in group for group in saved):
        return state_dict
    # torch refuses another number of groups
    pairs = list(zip(saved, optimizer.param_groups, strict=False))
    full = AdaPM(
        [{**_named(group), "roles": old.get("roles")} for old, group in pairs], momentum="full", unmatched="full"
    )
    _check_not_sharded(full)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of settings that differ, as all do
        full.load_state_dict(state_dict)
    state, groups = {}, []
    for old, group in pairs:
        for key, param in zip(old["params"], group["params"], strict=True):
            if param in full.state:
                state[key] = _state(full.parts(param), full.state[param])
        given = {key: old[key] for key in _HYPERPARAMETERS if key in old}
        groups.append({**group, **given, "params": old["params"]})
    return {**state_dict, "state": state, "param_groups": groups}


def _named(group: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a group, with their names in it."""
    return {key: group[key] for key in ("params", "param_names") if key in group}


def _check_not_sharded(optimizer: AdaPM) -> None:
    for parts in optimizer.all_parts():
        if parts[0].layout is not None:
            raise ValueError(
                f"{parts[0].name} is sharded, and a state becomes AdamW's on one device or under DDP alone; load it"
                " there, save AdamW's checkpoint, and go on from that"
            )


def _state(parts: tuple[Part, ...], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """State of one parameter with full momentum and elementwise second moments, as AdamW keeps it."""
    joined = {key: torch.empty_like(parts[0].param) for key in ("exp_avg", "exp_avg_sq")}
    for key, whole in joined.items():
        for part in parts:
            view = part.piece.view(whole)
            view.copy_(state[part.piece.prefix + key].reshape(view.shape))
    return {"step": state["step"], **joined}
