"""Cost of storing momentum in fewer bits."""

from collections.abc import Mapping
from typing import Any

from benchmarks.studies.base import BETAS95, Study, muon, paper
from benchmarks.studies.decoder import Shape
from benchmarks.studies.setting import Setting

_DTYPES = {"float32": None, "bfloat16": "bfloat16", "int8": "int8"}


def _by_dtype(label: str, optimizer: tuple[str, Mapping[str, Any]]) -> dict[str, tuple[str, Mapping[str, Any]]]:
    kind, options = optimizer
    return {f"{label}, {name}": (kind, {**options, "state_dtype": dtype}) for name, dtype in _DTYPES.items()}


def state_dtype() -> Study:
    rows = {
        **_by_dtype("AdaPM, paper", paper(betas=BETAS95)),
        **_by_dtype("PartialMuon, rank 5%", muon()),
    }
    return Study(
        "What does momentum in bfloat16 or in eight bits cost?",
        rows,
        lrs=(1e-3,),
        edge=(),
        rates={label: (2e-3,) for label in rows if label.startswith("PartialMuon")},
        seeds=3,
        setting=Setting(
            Shape(layers=2, width=192, n_head=6, context=128), steps=200, batch=8, val_windows=128, points=2
        ),
        baselines={name: (f"{name}, float32",) for name in ("AdaPM, paper", "PartialMuon, rank 5%")},
        finding=(
            "Little, on a small model over three seeds: int8 ends 0.0008 +- 0.0004 nats above float32 for AdaPM and "
            "0.0012 +- 0.0003 for PartialMuon, both within 0.003; bfloat16 ends equal. One learning rate each: at 2e-3 "
            "one seed of AdaPM ended 0.13 apart in float32 and bfloat16, so that such a rate shows nothing. More "
            "steps, other rates and larger models were not run."
        ),
    )
