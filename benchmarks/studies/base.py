"""Definition of a study, and names for common variants."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.studies.decoder import Shape
from benchmarks.studies.setting import Setting
from lightning_adapm.moments.policy import HALF_FACTORS, PAPER_MOMENTUM, PRESETS

GPT2_SMALL = Setting(Shape(layers=4, width=192, n_head=6, context=128))
FINETUNED_SMALL = Setting(Shape(layers=2, width=128, n_head=4, context=128), steps=200, batch=8, val_windows=128)
"""The smallest model that is finetuned, which takes seconds on a CPU."""
LLAMA_SMALL = Setting(Shape(layers=4, width=192, n_head=6, context=128, llama=True, n_query_groups=2))
GPT2_124M = Setting(
    Shape(layers=12, width=768, n_head=12, context=1024), steps=800, batch=32, val_windows=64, bf16=True
)
SIZES = {
    "1M": Shape(layers=5, width=128, n_head=4, context=128),
    "10M": Shape(layers=8, width=320, n_head=5, context=256),
    "25M": Shape(layers=8, width=512, n_head=8, context=512),
    "86M": GPT2_124M.shape,
    "125M": Shape(layers=18, width=768, n_head=12, context=1024),
}
"""GPT-2-like decoders by their number of parameters, for ``--size``."""

BEST, BESIDE = "best", "beside"
"""Learning rates by the results so far: the best one, and the next one beyond it where it is the highest or the lowest
tried (the higher first).
"""


@dataclass(frozen=True)
class Pretraining:
    """How the weights are trained that a study starts from: by AdamW, on windows as the study's own.

    ``once``: one model for all seeds, which then fix the batches alone.
    """

    lr: float = 2e-3
    steps: int = 600
    betas: tuple[float, float] = (0.9, 0.999)
    once: bool = False


@dataclass(frozen=True)
class Study:
    """One question.

    ``variants``: label to optimizer and options; ``baselines``: labels that every other variant is compared with,
    those of one name together (the best of them counts); ``edge``: learning rates added to a variant whose best is
    the highest or the lowest tried so far; ``rates``: label to learning rates of its own; ``changes``: label to
    what differs in its setting, where ``length`` multiplies the steps. ``curves``: also plot the loss against steps,
    bytes, seconds and state, and count the steps to a baseline's loss. ``crossed``: two options of whose values the
    variants are all combinations, which a table and a plot then show against each other. ``first``: label, learning
    rate and seed of the runs to make before all others, where time may not suffice for all; a rate may be
    :data:`BEST` or :data:`BESIDE`.
    """

    question: str
    variants: Mapping[str, tuple[str, Mapping[str, Any]]]
    lrs: tuple[float, ...] = (1e-3, 2e-3)
    edge: tuple[float, ...] = (3e-3, 4e-3, 6e-3)
    seeds: int = 8
    setting: Setting = GPT2_SMALL
    needs_data: bool = False
    pretrained: bool = False
    pretraining: Pretraining = Pretraining()
    curves: bool = False
    crossed: tuple[str, str] | None = None
    baselines: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    first: tuple[tuple[str, float | str, int], ...] = ()
    finding: str = "Not yet drawn."

    def setting_of(self, label: str) -> Setting:
        """Setting of a variant's runs."""
        changed = dict(self.changes.get(label, {}))
        steps = round(self.setting.steps * changed.pop("length", 1))
        return dataclasses.replace(self.setting, steps=steps, **changed)

    def lrs_of(self, label: str) -> tuple[float, ...]:
        """Learning rates of a variant, without what is added at the edge."""
        return self.rates.get(label, self.lrs)

    def edge_of(self, label: str) -> tuple[float, ...]:
        """Learning rates that may be added."""
        return () if label in self.rates else self.edge


def adamw(beta1: float = 0.9, beta2: float = 0.999) -> tuple[str, Mapping[str, Any]]:
    return "AdamW", {"betas": [beta1, beta2]}


def adapm(**options: Any) -> tuple[str, Mapping[str, Any]]:
    """AdaPM with its defaults but for some options."""
    return "AdaPM", options


def compact(momentum: Mapping[str, str] | None = None, **options: Any) -> tuple[str, Mapping[str, Any]]:
    """AdaPM with the compact table, rank 10 % and full momentum in float32 but for some options: its defaults when most
    studies of large models were run.
    """
    table = {**PRESETS["compact"], **(momentum or {})}
    return "AdaPM", {"rank": 0.1, "state_dtype": {"low_rank": "bfloat16"}, **options, "momentum": table}


def paper(**options: Any) -> tuple[str, Mapping[str, Any]]:
    """AdaPM as published but for some options: its defaults when most studies were run."""
    return "AdaPM", as_published(**options)


def five_steps(momentum: Mapping[str, str] | str | None = None, **options: Any) -> tuple[str, Mapping[str, Any]]:
    """PartialMuon with Muon's five steps of Newton-Schulz, refreshed every 10, rank 15 % and low-rank momentum wherever
    the paper has some, embeddings included, but for some options: its defaults when most studies were run.
    """
    table = momentum if isinstance(momentum, str) else {**PAPER_MOMENTUM, "embedding": "low_rank", **(momentum or {})}
    steps = {"newton_schulz": "muon", "ns_steps": 5, "update_proj_gap": 10}
    return "PartialMuon", {"rank": 0.15, "state_dtype": HALF_FACTORS, **steps, **options, "momentum": table}


def fast(**options: Any) -> tuple[str, Mapping[str, Any]]:
    """The same with fast steps."""
    return five_steps(**{"newton_schulz": "fast", "ns_steps": 4, **options})


def muon(**options: Any) -> tuple[str, Mapping[str, Any]]:
    """The same of rank 5 % in float32: its defaults when the first studies were run."""
    return five_steps(**{"rank": 0.05, "state_dtype": None, **options})


def partial_muon(**options: Any) -> tuple[str, Mapping[str, Any]]:
    """PartialMuon with its defaults but for some options."""
    return "PartialMuon", options


def four_steps(**options: Any) -> tuple[str, Mapping[str, Any]]:
    """The same with four fast steps of Newton-Schulz: its defaults when some studies were run."""
    return partial_muon(newton_schulz="fast", ns_steps=4, **options)


def small(**options: Any) -> tuple[str, Mapping[str, Any]]:
    """AdaPM as published, at rank 3 % and with factors in bfloat16."""
    return "AdaPM", as_published(**SMALL | options)


def trial(**options: Any) -> tuple[str, Mapping[str, Any]]:
    return "trial", as_published(**SMALL | options)


def as_published(momentum: Mapping[str, str] | str = "paper", **options: Any) -> dict[str, Any]:
    """The paper's settings but for some options. Roles that ``momentum`` does not name have the paper's policy."""
    table = momentum if isinstance(momentum, str) else {**PAPER_MOMENTUM, **momentum}
    return {"rank": 0.05, "state_dtype": None, **options, "momentum": table}


SMALL: dict[str, Any] = {"rank": 0.03, "state_dtype": {"low_rank": "bfloat16"}}
BETAS95 = [0.9, 0.95]
ADAMW = {"AdamW": adamw(), "AdamW, betas .9 .95": adamw(0.9, 0.95)}
ADAM_MINI = {
    "Adam-mini": paper(momentum="full", second_moment="block"),
    "Adam-mini, betas .9 .95": paper(momentum="full", second_moment="block", betas=BETAS95),
}
KEY_ROWS = {
    **ADAMW,
    "AdaPM, paper": paper(),
    "AdaPM, paper, betas .9 .95": paper(betas=BETAS95),
    **ADAM_MINI,
    "AdaPM block, paper": paper(second_moment="block"),
    "AdaPM block, paper, betas .9 .95": paper(second_moment="block", betas=BETAS95),
    "AdaPM smallest": small(),
    "AdaPM smallest, betas .9 .95": small(betas=BETAS95),
    "AdaPM smallest, block": small(second_moment="block"),
    "AdaPM smallest, block, betas .9 .95": small(second_moment="block", betas=BETAS95),
}
BOTH = {"AdamW": tuple(ADAMW), "Adam-mini": tuple(ADAM_MINI)}
BESIDE_ADAMW = {"AdamW": tuple(ADAMW)}
