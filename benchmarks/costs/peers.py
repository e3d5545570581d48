"""The optimizers that are measured side by side, as rows of the tables: torch's, other packages' and ours.

A peer that is not available raises :class:`benchmarks.studies.optimizers.UnavailableError` with the reason, which the
tables show in its row.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from benchmarks.costs.timing import time_steps
from benchmarks.studies import optimizers
from benchmarks.studies.base import fast, five_steps
from benchmarks.studies.optimizers import OURS, Parameters, UnavailableError
from lightning_adapm.moments.policy import DEFAULT_MOMENTUM

Result = TypeVar("Result")

LR = 1e-4
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Peer:
    """An optimizer with a name in the tables.

    ``kind`` and ``options`` are arguments of :func:`benchmarks.studies.optimizers.build`. ``interval``: steps between
    two refreshes of what is not computed in every step. ``restart`` makes the next step a refresh, for intervals too
    long to be timed. ``in_backward``: updates inside backward unless built with ``update_in_backward=False``. ``svd``:
    a refresh decomposes every hidden matrix. ``training_only``: differs from another peer only in a training step.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    interval: int = 1
    restart: Callable[[Optimizer], None] | None = None
    in_backward: bool = False
    svd: bool = False
    training_only: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is in this package, whose errors are not a reason to go on without it."""
        return self.kind in OURS


def _from_step_zero(optimizer: Optimizer) -> None:
    """GaLore and APOLLO refresh in steps that the gap divides, counted in each parameter's state."""
    for state in optimizer.state.values():
        state["step"] = 0


_BLOCK: dict[str, Any] = {"second_moment": "block"}
_FACTORED: dict[str, Any] = {"second_moment": "factored"}
_IN_BACKWARD: dict[str, Any] = {"update_in_backward": True}
_PAPER: dict[str, Any] = {"momentum": "paper", "rank": 0.05, "state_dtype": None}
_GAP: dict[str, Any] = {"update_proj_gap": 200, "proj_type": "std"}
_RANDOM = _GAP | {"proj": "random"}
_REFRESHED: dict[str, Any] = {"interval": 200, "restart": _from_step_zero}
BASES = ("AdamW, fused", "AdamW, foreach", "AdamW")
"""Baselines of the times."""
PEERS: tuple[Peer, ...] = (
    Peer("AdamW", "AdamW"),
    Peer("AdamW, foreach", "AdamW", {"foreach": True}),
    Peer("AdamW, fused", "AdamW", {"fused": True}),
    Peer("AdaPM", "AdaPM", interval=10),
    Peer("AdaPM block", "AdaPM", _BLOCK, interval=10),
    Peer("AdaPM factored", "AdaPM", _FACTORED, interval=10),
    Peer("AdaPM, paper", "AdaPM", _PAPER, interval=10),
    Peer("AdaPM block, paper", "AdaPM", _PAPER | _BLOCK, interval=10),
    *(
        Peer(f"{name}, in backward", "AdaPM", options | _IN_BACKWARD, interval=10, in_backward=True, training_only=True)
        for name, options in (("AdaPM", {}), ("AdaPM block", _BLOCK), ("AdaPM factored", _FACTORED))
    ),
    Peer("AdaPM, every step", "AdaPM", {"update_proj_gap": 1}),
    Peer("PartialMuon", "PartialMuon", interval=10),
    Peer("PartialMuon, refreshed every 20", "PartialMuon", {"update_proj_gap": 20}, interval=20),
    Peer("PartialMuon, AdaPM's table", "PartialMuon", {"momentum": DEFAULT_MOMENTUM, "rank": 0.05}, interval=10),
    Peer("PartialMuon, 3 fast steps", "PartialMuon", {"newton_schulz": "fast", "ns_steps": 3}, interval=10),
    Peer("PartialMuon, 4 fast steps", "PartialMuon", {"newton_schulz": "fast", "ns_steps": 4}, interval=10),
    Peer("PartialMuon, Muon's steps", "PartialMuon", {"newton_schulz": "muon"}, interval=10),
    Peer("PartialMuon, compact", *five_steps(), interval=10),
    Peer("PartialMuon, compact, fast steps", *fast(), interval=10),
    Peer("AdamMini", "AdamMini"),
    Peer("LoRAPre", "LoRAPre"),
    Peer("LoRAPre, Muon", "LoRAPre", {"variant": "muon"}),
    Peer("AdaLomo", "AdaLomo", in_backward=True),
    Peer("Lomo", "Lomo", in_backward=True),
    Peer("torch Adafactor", "Adafactor", {"weight_decay": 0.0}),
    Peer("torch Muon", "Muon"),
    Peer("adam_mini", "adam_mini"),
    Peer("galore-torch", "GaLore", _GAP | {"rank": 128, "scale": 0.25}, svd=True, **_REFRESHED),
    Peer("apollo-torch", "APOLLO", _RANDOM | {"rank": 256, "scale_type": "channel", "scale": 1}, **_REFRESHED),
    Peer("apollo-torch, Mini", "APOLLO", _RANDOM | {"rank": 1, "scale_type": "tensor", "scale": 128}, **_REFRESHED),
    Peer("torchao 8-bit", "torchao 8-bit"),
    Peer("torchao 4-bit", "torchao 4-bit"),
    Peer("bitsandbytes 8-bit", "bitsandbytes 8-bit"),
)


def build(peer: Peer, of: Parameters, limit: float, lr: float = LR, **options: Any) -> Optimizer:
    """The optimizer, unless a single one of its refreshes would take more than ``limit`` seconds."""
    if peer.svd and (expected := _svd_seconds(of)) > limit:
        raise UnavailableError(f"one refresh by SVDs takes {expected:.0f} s, by one of each shape (--peer-limit)")
    return optimizers.build({"kind": peer.kind, **peer.options, **options}, of, lr)


def _svd_seconds(of: Parameters) -> float:
    """Time of an SVD of all hidden matrices, measured on one of each shape."""
    shapes = [param.shape for param in of.hidden]
    device, total = of.tensors[0].device, 0.0
    for shape in set(shapes):
        decompose = partial(torch.linalg.svd, torch.randn(shape, device=device), full_matrices=False)
        total += time_steps(decompose, 1, device.type)[0] * shapes.count(shape)
    return total


def attempt(peer: Peer, work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Run ``work``; return its result and None, or None and the reason why the peer cannot be measured.

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


def chosen(word: str, peers: Sequence[Peer] = PEERS) -> tuple[Peer, ...]:
    """Those of ``peers`` whose names contain ``word``, or end in it before a ``$``: the type of a ``--peers`` option.

    Raises:
        argparse.ArgumentTypeError: no name contains it.
    """
    found = tuple(peer for peer in peers if word in f"{peer.name}$")
    if not found:
        names = ", ".join(repr(peer.name) for peer in peers)
        raise argparse.ArgumentTypeError(f"{word!r} is in none of the names {names}")
    return found


def select(found: Sequence[Sequence[Peer]] | None, peers: tuple[Peer, ...] = PEERS) -> tuple[Peer, ...]:
    """Each peer once of what a ``--peers`` option was given; all ``peers`` without it."""
    return peers if found is None else tuple(dict.fromkeys(peer for several in found for peer in several))
