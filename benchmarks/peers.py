"""The optimizers that are measured side by side: torch's, other packages', ours.

Each is built as its own documentation says, over the parameters of a decoder. A peer that cannot be had where it is
asked for raises :class:`UnavailableError` with the reason, which the tables show in its row.
"""

import argparse
import contextlib
import importlib
import io
from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.timing import time_steps
from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre

Result = TypeVar("Result")

LR = 1e-4
OUT_OF_MEMORY = "out of memory"
TABLES = ("wte", "wpe", "lm_head")
"""Parts of names of matrices that are not hidden: what Muon, GaLore and APOLLO leave to AdamW."""


class UnavailableError(Exception):
    """Why a peer is not measured here."""


@dataclass(frozen=True)
class Parameters:
    """Named parameters of a decoder, and the sizes that some optimizers ask for."""

    named: list[tuple[str, nn.Parameter]]
    width: int
    n_head: int
    n_query_groups: int

    @classmethod
    def of(cls, model: nn.Module) -> "Parameters":
        """All parameters of a module whose attention says ``n_head`` and ``n_query_groups``."""
        attention: Any = next(module for module in model.modules() if hasattr(module, "n_query_groups"))
        width, heads, groups = attention.proj.out_features, attention.n_head, attention.n_query_groups
        return cls(list(model.named_parameters()), width, heads, groups)

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

    @staticmethod
    def _is_hidden(name: str, param: Tensor) -> bool:
        return param.dim() == 2 and not any(table in name.split(".") for table in TABLES)

    @property
    def group(self) -> dict[str, Any]:
        """A group from whose names AdaPM finds the roles."""
        return {"params": self.named, "n_head": self.n_head, "n_query_groups": self.n_query_groups}


@dataclass(frozen=True)
class Peer:
    """An optimizer with a name in the tables.

    ``interval``: steps from one refresh of what it does not compute in every step to the next. ``restart`` makes the
    next step a refresh, for intervals too long to be timed. ``in_backward``: it updates inside backward unless built
    with ``update_in_backward=False``. ``svd``: a refresh decomposes every hidden matrix.
    ``training_only``: differs from another peer only in a whole training step.
    """

    name: str
    build: Callable[..., Optimizer]
    interval: int = 1
    restart: Callable[[Optimizer], None] | None = None
    in_backward: bool = False
    svd: bool = False
    training_only: bool = False

    @property
    def ours(self) -> bool:
        """In this package, whose errors are not a reason to go on without it."""
        return self.name.startswith(OURS)


class Several(Optimizer):
    """Optimizers of different parameters as one."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.state: Any = ChainMap(*(part.state for part in parts))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss


def load(module: str, name: str) -> Any:
    """A class of an optional package.

    Raises:
        UnavailableError: it is not installed, or what it imports is not.
    """
    try:
        # some print or warn about themselves on import
        with contextlib.redirect_stdout(io.StringIO()):
            found = getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise UnavailableError(f"not importable: {error}".splitlines()[0]) from error
    if found is None:
        version = getattr(importlib.import_module(module.split(".")[0]), "__version__", "")
        raise UnavailableError(f"{module.split('.')[0]} {version} has no {name}")
    return found


def _adamw(**options: Any) -> Callable[..., Optimizer]:
    return lambda of, lr=LR: torch.optim.AdamW(of.tensors, lr=lr, weight_decay=0.1, **options)


def _adafactor(of: Parameters, lr: float = LR) -> Optimizer:
    return load("torch.optim", "Adafactor")(of.tensors, lr=lr)


def _muon(of: Parameters, lr: float = LR) -> Optimizer:
    """Of the hidden matrices; AdamW's the rest, as its documentation says."""
    hidden = load("torch.optim", "Muon")(of.hidden, lr=lr)
    return Several(hidden, torch.optim.AdamW(of.other, lr=lr, weight_decay=0.1))


def _adam_mini(of: Parameters, lr: float = LR) -> Optimizer:
    sizes = {"dim": of.width, "n_heads": of.n_head, "n_kv_heads": of.n_query_groups}
    optimizer = load("adam_mini", "Adam_mini")(of.named, lr=lr, weight_decay=0.1, verbose=False, **sizes)
    # as it asks for: names it does not know would be one block each
    optimizer.wqk_names.add("qkv")
    optimizer.embd_names.add("wpe")
    return optimizer


def _galore(of: Parameters, lr: float = LR) -> Optimizer:
    low_rank = {"params": of.hidden, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": of.other}, low_rank]
    return load("galore_torch", "GaLoreAdamW")(groups, lr=lr, weight_decay=0.1, no_deprecation_warning=True)


def _apollo(**options: Any) -> Callable[..., Optimizer]:
    def build(of: Parameters, lr: float = LR) -> Optimizer:
        low_rank = {"params": of.hidden, "proj": "random", "update_proj_gap": 200, "proj_type": "std", **options}
        return load("apollo_torch", "APOLLOAdamW")([{"params": of.other}, low_rank], lr=lr, weight_decay=0.1)

    return build


def _imported(module: str, name: str) -> Callable[..., Optimizer]:
    return lambda of, lr=LR: load(module, name)(of.tensors, lr=lr, weight_decay=0.1)


def _ours(kind: type[AdaPM], **fixed: Any) -> Callable[..., Optimizer]:
    return lambda of, lr=LR, **options: kind([of.group], lr=lr, weight_decay=0.1, **(fixed | options))


def _from_step_zero(optimizer: Optimizer) -> None:
    """GaLore and APOLLO refresh in steps that the gap divides, counted in each parameter's state."""
    for state in optimizer.state.values():
        state["step"] = 0


_REFRESHED: dict[str, Any] = {"interval": 200, "restart": _from_step_zero}
_BF16 = {"low_rank": "bfloat16"}
OURS = ("AdaPM", "AdamMini", "LoRAPre", "AdaLomo", "Lomo")
BASES = ("AdamW, fused", "AdamW, foreach", "AdamW")
"""What times are compared with."""
PEERS: tuple[Peer, ...] = (
    Peer("AdamW", _adamw()),
    Peer("AdamW, foreach", _adamw(foreach=True)),
    Peer("AdamW, fused", _adamw(fused=True)),
    Peer("AdaPM", _ours(AdaPM), 10),
    Peer("AdaPM block", _ours(AdaPM, second_moment="block"), 10),
    Peer("AdaPM factored", _ours(AdaPM, second_moment="factored"), 10),
    Peer("AdaPM block, bfloat16 factors", _ours(AdaPM, second_moment="block", state_dtype=_BF16), 10),
    Peer(
        "AdaPM block, in backward",
        _ours(AdaPM, second_moment="block", update_in_backward=True),
        10,
        in_backward=True,
        training_only=True,
    ),
    Peer("AdaPM, every step", _ours(AdaPM, update_proj_gap=1)),
    Peer("AdamMini", _ours(AdamMini)),
    Peer("LoRAPre", _ours(LoRAPre)),
    Peer("LoRAPre, Muon", _ours(LoRAPre, variant="muon")),
    Peer("AdaLomo", _ours(AdaLomo), in_backward=True),
    Peer("Lomo", _ours(Lomo), in_backward=True),
    Peer("torch Adafactor", _adafactor),
    Peer("torch Muon", _muon),
    Peer("adam_mini", _adam_mini),
    Peer("galore-torch", _galore, svd=True, **_REFRESHED),
    Peer("apollo-torch", _apollo(rank=256, scale_type="channel", scale=1), **_REFRESHED),
    Peer("apollo-torch, Mini", _apollo(rank=1, scale_type="tensor", scale=128), **_REFRESHED),
    Peer("torchao 8-bit", _imported("torchao.optim", "AdamW8bit")),
    Peer("torchao 4-bit", _imported("torchao.optim", "AdamW4bit")),
    Peer("bitsandbytes 8-bit", _imported("bitsandbytes.optim", "AdamW8bit")),
)


def build(peer: Peer, of: Parameters, limit: float, **options: Any) -> Optimizer:
    """The optimizer, unless a single one of its refreshes would take more than ``limit`` seconds."""
    if peer.svd and (expected := _svd_seconds(of)) > limit:
        raise UnavailableError(f"one refresh by SVDs takes {expected:.0f} s, by one of each shape (--peer-limit)")
    return peer.build(of, **options)


def _svd_seconds(of: Parameters) -> float:
    """How long the singular values and vectors of all hidden matrices take, by one of each shape."""
    shapes = [param.shape for param in of.hidden]
    device, total = of.tensors[0].device, 0.0
    for shape in set(shapes):
        decompose = partial(torch.linalg.svd, torch.randn(shape, device=device), full_matrices=False)
        total += time_steps(decompose, 1, device.type)[0] * shapes.count(shape)
    return total


def attempt(peer: Peer, work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What ``work`` returns and None, or None and why the peer cannot be measured.

    Only want of memory excuses ours.
    """
    try:
        return work(), None
    except UnavailableError as error:
        return None, str(error)
    except torch.OutOfMemoryError:
        return None, OUT_OF_MEMORY
    except Exception as error:
        if peer.ours:
            raise
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:200]


def chosen(word: str) -> tuple[Peer, ...]:
    """The peers whose names contain ``word``: the type of a ``--peers`` option.

    Raises:
        argparse.ArgumentTypeError: no name contains it.
    """
    found = tuple(peer for peer in PEERS if word in peer.name)
    if not found:
        names = ", ".join(repr(peer.name) for peer in PEERS)
        raise argparse.ArgumentTypeError(f"{word!r} is in none of the names {names}")
    return found


def select(found: Sequence[Sequence[Peer]] | None) -> tuple[Peer, ...]:
    """Each peer once of what a ``--peers`` option was given; all without it."""
    return PEERS if found is None else tuple(dict.fromkeys(peer for several in found for peer in several))
