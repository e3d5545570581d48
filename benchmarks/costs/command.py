"""Shared parts of the command lines and results of step_time, training_time and peak_memory."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.costs.models import DTYPES, MODELS, numel
from benchmarks.costs.peers import PEERS, Peer, chosen
from benchmarks.pages.page import RESULTS
from benchmarks.studies.decoder import Shape
from benchmarks.studies.optimizers import UnavailableError

LATE = "no time left (--time-limit)"
"""Reason to skip a peer once time has run out."""


def parser_of(module: str, description: str | None, peers: Sequence[Peer] = PEERS) -> argparse.ArgumentParser:
    """Make a parser with the options for models, devices, ``peers``, time limits and outputs."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, default="llama")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the parameters")
    parser.add_argument(
        "--peers",
        nargs="*",
        type=partial(chosen, peers=peers),
        metavar="NAME",
        help="only those whose names contain one of these",
    )
    parser.add_argument("--peer-limit", type=float, default=20, help="seconds that a refresh by SVDs may take")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds, after which the rest is skipped")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def add_windows(parser: argparse.ArgumentParser, batch: int) -> None:
    """Add the options for the size of a training step's input."""
    parser.add_argument("--batch", type=int, default=batch, help="windows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")


def check_length(parser: argparse.ArgumentParser, length: int, model: str, shape: Shape) -> None:
    """Refuse windows longer than a table of positions."""
    if not shape.rotary and length > shape.context:
        parser.error(f"--length must be at most {shape.context} for {model}, but got {length}")


def begin(peer: Peer, deadline: float) -> None:
    """Print what is measured next.

    Raises:
        UnavailableError: It is too late, by ``time.monotonic()``.
    """
    if time.monotonic() > deadline:
        raise UnavailableError(LATE)
    print(peer.name, file=sys.stderr, flush=True)


def described(device: str, name: str, dtype: str, shape: Shape, all_layers: int) -> dict[str, Any]:
    """Describe the model in a result: its ``shape``, out of ``all_layers`` layers."""
    return {
        "device": device,
        "model": name,
        "dtype": dtype,
        "layers": shape.layers,
        "all_layers": all_layers,
        "parameters": numel(shape),
    }


def skipped_cells(reason: str, columns: int) -> list[str]:
    """Cells after the name in a row without numbers."""
    return [f"skipped: {reason}".replace("|", "/"), *[""] * (columns - 1)]
