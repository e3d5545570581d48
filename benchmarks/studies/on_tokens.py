"""Models of some 60 to 130 million parameters on tokens: every optimizer at its own best learning rate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.studies.at_size import BEST_SO_FAR, more, muon
from benchmarks.studies.base import BESIDE, BEST, BETAS95, Study, adamw, adapm, paper
from benchmarks.studies.comparison import LOW_RANK
from benchmarks.studies.decoder import Shape
from benchmarks.studies.setting import Setting

VOCAB = 1 << 15
GPT2 = Setting(
    Shape(layers=12, width=768, n_head=12, context=1024, vocab=VOCAB), steps=1500, batch=64, val_windows=256, bf16=True
)
"""65,536 tokens a step, as in every setting here."""
LLAMA_60M = dataclasses.replace(
    GPT2,
    shape=Shape(layers=8, width=512, n_head=8, context=256, llama=True, vocab=VOCAB),
    batch=256,
    val_windows=1024,
)
"""The shape that GaLore's paper and those after it train, but for MLPs of 1408 rows instead of 1376."""
LLAMA_130M = dataclasses.replace(
    LLAMA_60M, shape=Shape(layers=12, width=768, n_head=12, context=256, llama=True, vocab=VOCAB)
)
ROWS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "AdamW, betas .9 .95": adamw(0.9, 0.95),
    "AdaPM": adapm(betas=BETAS95),
    "AdaPM, paper": paper(betas=BETAS95),
    BEST_SO_FAR: more(),
    "PartialMuon": muon(),
    "Muon": muon(momentum="full"),
    "AdaPM block": adapm(betas=BETAS95, second_moment="block"),
    "PartialMuon, embedding full": muon(momentum={"embedding": "full"}),
    "Adam-mini": paper(momentum="full", second_moment="block", betas=BETAS95),
    "AdamW": adamw(),
    "Adafactor (torch)": ("Adafactor", {}),
    "APOLLO-Mini (apollo-torch)": (
        "APOLLO",
        {**LOW_RANK, "rank": 1, "betas": BETAS95, "scale": 128.0, "proj": "random", "scale_type": "tensor"},
    ),
    "LoRA-Pre, Muon": ("LoRAPre", {"betas": BETAS95, "variant": "muon"}),
    "GaLore (galore-torch)": ("GaLore", {**LOW_RANK, "betas": BETAS95, "scale": 0.25}),
    "LoRA-Pre": ("LoRAPre", {"betas": BETAS95}),
}
"""In order of importance, the slowest last."""
OF_MUON = (8e-3, 4e-3, 1.6e-2, 3.2e-2)
OF_PROJECTIONS = (1e-2, 5e-3, 2e-2, 4e-2)
RATES = {
    **dict.fromkeys(("PartialMuon", "PartialMuon, embedding full", "Muon", "LoRA-Pre, Muon"), OF_MUON),
    **dict.fromkeys(("APOLLO-Mini (apollo-torch)", "GaLore (galore-torch)"), OF_PROJECTIONS),
    "Adafactor (torch)": (1e-2, 5e-3, 2e-2, 4e-2),
    "LoRA-Pre": (5e-4, 2.5e-4, 1e-3, 2e-3),
}
FIRST: tuple[tuple[str, float | str, int], ...] = (
    ("AdamW, betas .9 .95", 1.2e-3, 0),
    ("PartialMuon", 8e-3, 0),
    ("AdaPM", 1.2e-3, 0),
    (BEST_SO_FAR, 1.2e-3, 0),
    ("AdamW, betas .9 .95", 2.4e-3, 0),
    ("Muon", 8e-3, 0),
    ("AdaPM block", 1.2e-3, 0),
    ("AdamW, betas .9 .95", BESIDE, 0),
    ("PartialMuon", 4e-3, 0),
    (BEST_SO_FAR, 2.4e-3, 0),
    ("AdaPM", 6e-4, 0),
    ("AdaPM", BESIDE, 0),
    ("PartialMuon", BESIDE, 0),
    (BEST_SO_FAR, BESIDE, 0),
    ("Muon", 4e-3, 0),
    ("AdaPM block", 6e-4, 0),
    ("AdaPM block", BESIDE, 0),
    *((label, BEST, seed) for seed in (1, 2) for label in ("AdamW, betas .9 .95", "AdaPM", BEST_SO_FAR, "PartialMuon")),
)
"""What a verdict on AdaPM and PartialMuon hangs on: a worse rate on both sides of the best, then three seeds."""


def on_tokens(question: str, setting: Setting, finding: str = "Not yet run.") -> Study:
    """One seed of every row; a verdict's rows have three."""
    return Study(
        f"{question}, on tokens of a vocabulary trained on the same text?",
        ROWS,
        lrs=(1.2e-3, 6e-4, 2.4e-3),
        edge=(4.8e-3,),
        seeds=1,
        setting=setting,
        curves=True,
        baselines={"AdamW": ("AdamW, betas .9 .95", "AdamW"), "Muon": ("Muon",)},
        rates=RATES,
        first=FIRST,
        finding=finding,
    )


def tokens_gpt2() -> Study:
    return on_tokens("Which optimizer trains a GPT-2 124M, with a vocabulary of 32,768", GPT2)


def tokens_llama_60m() -> Study:
    return on_tokens(
        "Which optimizer trains a Llama of 60 million parameters",
        LLAMA_60M,
        "None yet: AdamW was run at one learning rate, and nothing else.",
    )


def tokens_llama_130m() -> Study:
    return on_tokens("Which optimizer trains a Llama of 130 million parameters", LLAMA_130M)
