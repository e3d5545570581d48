"""Optimizers by kind: each is built as its own documentation says, with every option that it runs under written out."""

import contextlib
import importlib
import inspect
import io
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.studies.parts_of_muon import Bookkeeping, NewtonSchulzAlone
from benchmarks.studies.stand_ins import standing_in
from benchmarks.studies.trials import Trial
from benchmarks.studies.updated import UpdatedLoRAPre
from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon
from lightning_adapm.moments.policy import momentum_table
from lightning_adapm.optim import partial_muon
from lightning_adapm.optim.options import AUTO, options_of

DECAY = 0.1
"""Weight decay unless the options say another, on every parameter."""
TABLES = ("wte", "wpe", "lm_head")
"""Parts of names of matrices that are not hidden: what Muon, GaLore and APOLLO leave to AdamW."""
ROLES: dict[str, Callable[..., Optimizer]] = {"AdaPM": AdaPM, "trial": Trial, "PartialMuon": PartialMuon}
"""Kinds whose momentum depends on the role."""
OURS = ROLES | {
    "AdaLomo": AdaLomo,
    "AdamMini": AdamMini,
    "Bookkeeping": Bookkeeping,
    "LoRAPre": LoRAPre,
    "LoRAPre trial": UpdatedLoRAPre,
    "Lomo": Lomo,
    "Newton-Schulz": NewtonSchulzAlone,
}
TRIALS = ("trial", "LoRAPre trial")
"""Kinds that are only tried, outside the package."""


class UnavailableError(Exception):
    """Why an optimizer cannot be had here."""


@dataclass(frozen=True)
class Parameters:
    """Named parameters of a model or of copies of it, and the head counts of its attention, if it has any."""

    named: list[tuple[str, nn.Parameter]]
    heads: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module, named: Iterable[tuple[str, nn.Parameter]] | None = None) -> "Parameters":
        """``named`` are its copies'; by default its own."""
        attention = next((module for module in model.modules() if hasattr(module, "n_query_groups")), None)
        heads = {} if attention is None else {key: getattr(attention, key) for key in ("n_head", "n_query_groups")}
        return cls(list(model.named_parameters() if named is None else named), heads)

    @property
    def tensors(self) -> list[nn.Parameter]:
        return [param for _, param in self.named]

    @property
    def hidden(self) -> list[nn.Parameter]:
        """The matrices inside the blocks."""
        return [param for name, param in self.named if self._is_hidden(name, param)]

    @property
    def other(self) -> list[nn.Parameter]:
        """Tables, norms and biases."""
        return [param for name, param in self.named if not self._is_hidden(name, param)]

    def called(self, table: str) -> list[nn.Parameter]:
        """The tables of this name, one for each copy of the model."""
        return [param for name, param in self.named if table in name.split(".")]

    @staticmethod
    def _is_hidden(name: str, param: Tensor) -> bool:
        return param.dim() == 2 and not any(table in name.split(".") for table in TABLES)

    @property
    def group(self) -> dict[str, Any]:
        """A group from whose names AdaPM finds the roles."""
        return {"params": self.named, **self.heads}


class States(ChainMap[Any, Any]):
    """States of several optimizers as one; a look-up adds nothing to those that make what they lack."""

    def __getitem__(self, key: Any) -> Any:
        for mapping in self.maps:
            if key in mapping:
                return mapping[key]
        raise KeyError(key)


class Several(Optimizer):
    """Optimizers of different parameters as one; their groups are its own, so that a schedule reaches them."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.state: Any = States(*(part.state for part in parts))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def _of_all(make: Callable[..., Any], of: Parameters, **options: Any) -> Optimizer:
    return make(of.tensors, **options)


def _muon(make: Callable[..., Any], of: Parameters, lr: float, weight_decay: float, **options: Any) -> Optimizer:
    """Muon for hidden matrices, and AdamW for the rest at the same learning rate."""
    rest = torch.optim.AdamW(of.other, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    return Several(make(of.hidden, lr=lr, weight_decay=weight_decay, **options), rest)


def _adam_mini(make: Callable[..., Any], of: Parameters, **options: Any) -> Optimizer:
    width = next(param.shape[-1] for param in of.tensors if param.dim() == 2)
    sizes = {"dim": width, "n_heads": of.heads["n_head"], "n_kv_heads": of.heads["n_query_groups"]}
    optimizer = make(of.named, verbose=False, **sizes, **options)
    # as its warnings ask (its README says nothing of fused weights): a matrix whose name it lacks would be one block
    optimizer.wqk_names.add("qkv")
    optimizer.embd_names.add("wpe")
    return optimizer


def _projected(
    make: Callable[..., Any],
    of: Parameters,
    rank: float,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    **projection: Any,
) -> Optimizer:
    """GaLore and APOLLO, of the hidden matrices; a ``rank`` below 1 is a share of a matrix's smaller side."""
    groups: list[dict[str, Any]] = [{"params": of.other}]
    for side in sorted({min(param.shape) for param in of.hidden}):
        alike = [param for param in of.hidden if min(param.shape) == side]
        groups.append({"params": alike, "rank": max(1, round(rank * side)) if rank < 1 else rank, **projection})
    return make(groups, lr=lr, betas=betas, weight_decay=weight_decay, no_deprecation_warning=True)


def _scale(make: Callable[..., Any], of: Parameters, lr: float, weight_decay: float, momentum: float) -> Optimizer:
    """SCALE as its authors set it up: momentum for the head, columns of tables, AdamW for vectors.

    A tied table is the head, of which their code has none.
    """
    heads = of.called("lm_head") or of.called("wte")
    tables = [param for param in (*of.called("wte"), *of.called("wpe")) if all(param is not head for head in heads)]
    groups = [{"params": of.hidden}, {"params": heads, "momentum": momentum}, {"params": tables, "dim": 0}]
    vectors = [param for param in of.tensors if param.dim() < 2]
    rest = torch.optim.AdamW(vectors, lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
    return Several(make(groups, lr=lr, weight_decay=weight_decay), rest)


class Library(NamedTuple):
    """Class of another library: its module, its package on PyPI, and its use.

    ``unused``: modules that it imports for classes that are not measured here.
    """

    module: str
    name: str
    package: str
    use: Callable[..., Optimizer] = _of_all
    unused: tuple[str, ...] = ()


_EIGHT_BITS = ("bitsandbytes", "bitsandbytes.functional", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")
"""What galore-torch and apollo-torch import for their optimizers in eight bits alone."""


LIBRARIES = {
    "AdamW": Library("torch.optim", "AdamW", "torch"),
    "Adafactor": Library("torch.optim", "Adafactor", "torch 2.5"),
    "Muon": Library("torch.optim", "Muon", "torch 2.9", _muon),
    "adam_mini": Library("adam_mini", "Adam_mini", "adam-mini", _adam_mini),
    "GaLore": Library("galore_torch", "GaLoreAdamW", "galore-torch", _projected, _EIGHT_BITS),
    "APOLLO": Library("apollo_torch", "APOLLOAdamW", "apollo-torch", _projected, _EIGHT_BITS),
    "SCALE": Library("benchmarks.studies.scale", "Scale", "this repository", _scale),
    "torchao 8-bit": Library("torchao.optim", "AdamW8bit", "torchao"),
    "torchao 4-bit": Library("torchao.optim", "AdamW4bit", "torchao"),
    "bitsandbytes 8-bit": Library("bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
}


def resolve(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the defaults filled in, as JSON can hold them: what identifies a run, and what it ran under."""
    if kind == "AdamW":
        return {"kind": kind, "betas": [0.9, 0.999], **options}
    if kind not in ROLES:
        return {"kind": kind, **options}
    muon = kind == "PartialMuon"
    optimizer = PartialMuon if muon else AdaPM
    fixed = (
        "params",
        "lr",
        "weight_decay",
        "eps",
        "roles",
        "unmatched",
        "no_decay",
        "basis",
        "maximize",
        "rounding",
        "update_in_backward",
        "convolutions",
    )
    signature = inspect.signature(optimizer).parameters
    defaults = {name: signature[name].default for name in options_of(optimizer) if name not in fixed}
    resolved = {"kind": kind, **defaults, **options}
    momentum = resolved["momentum"]
    if muon and not isinstance(momentum, str):
        momentum = {**partial_muon.DEFAULT_MOMENTUM, **(momentum or {})}
    resolved["momentum"] = momentum_table(momentum, "error")
    for option, meaning in optimizer.automatic.items():
        if resolved[option] == AUTO:
            resolved[option] = meaning(resolved)
    resolved["betas"] = list(resolved["betas"])
    if muon:
        resolved["ns_steps"] = partial_muon.steps_of(resolved["newton_schulz"], resolved["ns_steps"])
    if resolved.get("newton_schulz") == "muon":  # as runs from before it was an option
        del resolved["newton_schulz"]
    return resolved


def missing(kind: str) -> str | None:
    """Why an optimizer cannot run here; None if it can."""
    if kind not in LIBRARIES:
        return None
    try:
        load(LIBRARIES[kind])
    except UnavailableError as reason:
        return f"needs {LIBRARIES[kind].package}: {reason}"
    return None


def load(library: Library) -> Any:
    """The class.

    Raises:
        UnavailableError: It is not installed, or a package that it imports is not.
    """
    module, name = library.module, library.name
    try:
        # some print or warn about themselves on import
        with contextlib.redirect_stdout(io.StringIO()), standing_in(library.unused):
            found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UnavailableError(f"not importable: {error}".splitlines()[0]) from error
    if found is None:
        version = getattr(importlib.import_module(module.split(".")[0]), "__version__", "")
        raise UnavailableError(f"{module.split('.')[0]} {version} has no {name}")
    return found


def build(resolved: Mapping[str, Any], of: Parameters, lr: float) -> Optimizer:
    """The optimizer of :func:`resolve`'s options.

    Raises:
        UnavailableError: :func:`missing` says what to install.
    """
    options = {"lr": lr, "weight_decay": DECAY, **resolved}
    kind = options.pop("kind")
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if kind in OURS:
        return OURS[kind]([of.group], **options)
    return LIBRARIES[kind].use(load(LIBRARIES[kind]), of, **options)
