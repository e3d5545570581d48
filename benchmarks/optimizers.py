"""Optimizers by name, with every option that they run under written out."""

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.trials import Trial
from lightning_adapm import AdaLomo, AdamMini, AdaPM, LoRAPre
from lightning_adapm.policy import momentum_table

DECAY = 0.1
"""Weight decay of every optimizer, on every parameter."""
ROLES: dict[str, Callable[..., Optimizer]] = {"AdaPM": AdaPM, "trial": Trial}
"""Kinds with all of AdaPM's options."""
NEIGHBOURS: dict[str, Callable[..., Optimizer]] = {"AdaLomo": AdaLomo, "AdamMini": AdamMini, "LoRAPre": LoRAPre}
LIBRARIES = {
    "Adafactor": ("torch.optim", "Adafactor", "torch 2.5"),
    "Muon": ("torch.optim", "Muon", "torch 2.9"),
    "adam_mini": ("adam_mini", "Adam_mini", "adam-mini"),
    "GaLore": ("galore_torch", "GaLoreAdamW", "galore-torch"),
    "APOLLO": ("apollo_torch", "APOLLOAdamW", "apollo-torch"),
}
"""Kind to module, class and what to install."""


def resolve(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the defaults filled in, as JSON can hold them: what identifies a run, and what it ran under."""
    if kind == "AdamW":
        return {"kind": kind, "betas": [0.9, 0.999], **options}
    if kind not in ROLES:
        return {"kind": kind, **options}
    signature = inspect.signature(AdaPM.__init__).parameters
    fixed = (
        "self",
        "params",
        "lr",
        "weight_decay",
        "eps",
        "roles",
        "unmatched",
        "no_decay",
        "basis",
        "maximize",
        "update_in_backward",
    )
    defaults = {name: item.default for name, item in signature.items() if name not in fixed}
    resolved = {"kind": kind, **defaults, **options}
    resolved["momentum"] = momentum_table(resolved["momentum"], "error")
    resolved["betas"] = list(resolved["betas"])
    return resolved


def missing(kind: str) -> str | None:
    """Why an optimizer cannot run here; None if it can."""
    if kind not in LIBRARIES:
        return None
    module, name, package = LIBRARIES[kind]
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f"needs {package}: {error}"
    return None


def build(
    resolved: Mapping[str, Any], named: Iterator[tuple[str, nn.Parameter]], model: nn.Module, lr: float
) -> Optimizer:
    """The optimizer of :func:`resolve`'s options over ``named`` parameters of copies of ``model``."""
    kind, options = resolved["kind"], {key: value for key, value in resolved.items() if key != "kind"}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    attention = next((module for module in model.modules() if hasattr(module, "n_query_groups")), None)
    heads = {} if attention is None else {key: getattr(attention, key) for key in ("n_head", "n_query_groups")}
    if kind == "AdamW":
        return torch.optim.AdamW(list(named), lr=lr, weight_decay=DECAY, **options)
    if kind in LIBRARIES:
        return build_peer(kind, list(named), lr, options, heads)
    params = [{"params": list(named), **heads}]
    return (ROLES | NEIGHBOURS)[kind](params, lr=lr, weight_decay=DECAY, **options)


def build_peer(
    kind: str, named: list[tuple[str, nn.Parameter]], lr: float, options: Mapping[str, Any], heads: Mapping[str, int]
) -> Optimizer:
    """Another library's optimizer, used as its documentation says. A ``rank`` is a share of a matrix's smaller side.

    Raises:
        ImportError: :func:`missing` says what to install.
    """
    reason = missing(kind)
    if reason is not None:
        raise ImportError(f"{kind} {reason}")
    module, name, _ = LIBRARIES[kind]
    make = getattr(importlib.import_module(module), name)
    common: dict[str, Any] = {"lr": lr, "weight_decay": DECAY}
    if kind == "Adafactor":
        return make([param for _, param in named], **common, **options)
    if kind == "adam_mini":
        width = next(param.shape[-1] for _, param in named if param.dim() == 2)
        sizes = {"dim": width, "n_heads": heads["n_head"], "n_kv_heads": heads["n_query_groups"]}
        return make(named, **common, **sizes, verbose=False, **options)
    hidden = [param for key, param in named if param.dim() == 2 and ".blocks." in key]
    rest = [param for key, param in named if param.dim() != 2 or ".blocks." not in key]
    if kind == "Muon":
        others = torch.optim.AdamW(rest, betas=(0.9, 0.95), **common)
        return Together(make(hidden, **common, **options), others)
    betas = {key: value for key, value in options.items() if key == "betas"}
    projection = {key: value for key, value in options.items() if key not in ("betas", "rank")}
    groups: list[dict[str, Any]] = [{"params": rest}]
    for size in sorted({min(param.shape) for param in hidden}):
        alike = [param for param in hidden if min(param.shape) == size]
        groups.append({"params": alike, "rank": max(1, round(options["rank"] * size)), **projection})
    return make(groups, **common, **betas, no_deprecation_warning=True)


class Together(Optimizer):
    """Two optimizers that step together and share a learning rate."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.param_groups = groups  # theirs, so that a schedule reaches them

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()
