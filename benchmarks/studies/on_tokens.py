"""Models of some 60 to 130 million parameters on tokens: every optimizer at its own best learning rate."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.studies.at_size import BEST_SO_FAR, BOUNDED, TABLES_FULL, more
from benchmarks.studies.at_size import ROWS as AT_SIZE_ROWS
from benchmarks.studies.base import (
    BESIDE,
    BEST,
    BETAS95,
    Study,
    adamw,
    adapm,
    compact,
    five_steps,
    four_steps,
    muon,
    paper,
    partial_muon,
)
from benchmarks.studies.comparison import LOW_RANK
from benchmarks.studies.decoder import Shape
from benchmarks.studies.muon import ADAPMS, FORMER, FOUR, MUONS_STEPS, OF_ADAPM, OF_TABLE
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
    "AdaPM block": adapm(betas=BETAS95, second_moment="block"),
    "AdaPM factored": adapm(betas=BETAS95, second_moment="factored"),
    "PartialMuon": partial_muon(),
    MUONS_STEPS: partial_muon(newton_schulz="muon"),
    "SCALE": ("SCALE", {"momentum": 0.9}),
    "APOLLO-Mini (apollo-torch)": (
        "APOLLO",
        {**LOW_RANK, "rank": 1, "betas": BETAS95, "scale": 128.0, "proj": "random", "scale_type": "tensor"},
    ),
    "Muon": muon(momentum="full"),
    "Adam-mini": paper(momentum="full", second_moment="block", betas=BETAS95),
    "AdaPM, paper": paper(betas=BETAS95),
    "GaLore (galore-torch)": ("GaLore", {**LOW_RANK, "betas": BETAS95, "scale": 0.25}),
    "Adafactor (torch)": ("Adafactor", {}),
    "AdamW": adamw(),
    "LoRA-Pre, Muon": ("LoRAPre", {"betas": BETAS95, "variant": "muon"}),
    "LoRA-Pre": ("LoRAPre", {"betas": BETAS95}),
    BEST_SO_FAR: more(),
    ADAPMS: partial_muon(**OF_ADAPM),
    f"{ADAPMS}, 4 fast steps": four_steps(**OF_TABLE),
    FOUR: four_steps(),
    FORMER: five_steps(),
    "AdaPM, compact": compact(betas=BETAS95),
    "AdaPM block, compact": compact(betas=BETAS95, second_moment="block"),
    "AdaPM factored, compact": compact(betas=BETAS95, second_moment="factored"),
    "AdaPM factored, compact but for embeddings": compact(
        {"embedding": "full"}, betas=BETAS95, second_moment="factored"
    ),
    TABLES_FULL: AT_SIZE_ROWS[TABLES_FULL],
    BOUNDED: AT_SIZE_ROWS[BOUNDED],
    "AdaPM, paper, not corrected": paper(betas=BETAS95, debias=False),
    "AdaPM factored, betas .9 .999": adapm(second_moment="factored"),
    "AdaPM factored, not corrected": adapm(betas=BETAS95, second_moment="factored", debias=False),
    "AdaPM factored, refreshed every 20": adapm(betas=BETAS95, second_moment="factored", update_proj_gap=20),
    "AdaPM factored, no clamp": adapm(betas=BETAS95, second_moment="factored", clip_threshold=None),
    "AdaPM factored, rank 10%": adapm(betas=BETAS95, second_moment="factored", rank=0.1),
    "AdaPM factored, float32": adapm(betas=BETAS95, second_moment="factored", state_dtype=None),
    "AdaPM factored, weight decay .01": adapm(betas=BETAS95, second_moment="factored", weight_decay=0.01),
    "AdaPM factored, all full": adapm(betas=BETAS95, second_moment="factored", momentum="full", state_dtype=None),
}
"""In order of importance. "Muon" is PartialMuon with full momentum; "Adam-mini" is AdaPM with it. The last rows change
one default each of AdaPM factored.
"""
OF_MUON = (8e-3, 4e-3, 1.6e-2, 3.2e-2)
OF_PROJECTIONS = (1e-2, 5e-3, 2e-2, 4e-2)
RATES = {
    **dict.fromkeys((label for label in ROWS if "Muon" in label), OF_MUON),
    **dict.fromkeys(("APOLLO-Mini (apollo-torch)", "GaLore (galore-torch)"), OF_PROJECTIONS),
    "Adafactor (torch)": (2e-2, 1e-2, 4e-2, 5e-3),
    "LoRA-Pre": (5e-4, 2.5e-4, 1e-3, 2e-3),
}
"""Learning rates of optimizers for which they mean something else than for AdamW, the likely best first."""
OF_BLOCKS = "AdaPM block", "Adam-mini"
"""Rows that at 86 million parameters are best at half of AdamW's learning rate."""
VERDICT = "AdamW, betas .9 .95", "AdaPM", "AdaPM factored", "PartialMuon"


def rates_of(lr: float) -> dict[str, tuple[float, ...]]:
    """Learning rates of the rows that do not have AdamW's, whose likely best is ``lr``; a row's likely best first."""
    return {**RATES, **dict.fromkeys(OF_BLOCKS, (lr / 2, lr / 4, lr, 2 * lr))}


def first(lr: float) -> tuple[tuple[str, float | str, int], ...]:
    """Runs in the order in which they are worth having: every row at its likely best rate, the next rates until a worse
    one was tried on both sides of the best, and three seeds of what a verdict hangs on.

    Args:
        lr: Likely best rate of the rows without one of their own.
    """
    rates = rates_of(lr)
    guesses = [(label, rates.get(label, (lr,))[0], 0) for label in ROWS]
    beside = [(label, BESIDE, 0) for _ in range(3) for label in ROWS]
    return (*guesses, *beside, *((label, BEST, seed) for seed in (1, 2) for label in VERDICT))


def on_tokens(question: str, setting: Setting, lr: float = 1.2e-3, finding: str = "Not yet run.") -> Study:
    """One seed of every row; a verdict's rows have three. ``lr`` is likely to be AdamW's best."""
    return Study(
        f"{question}, on tokens of a vocabulary trained on the same text?",
        ROWS,
        lrs=(lr, lr / 2, 2 * lr),
        edge=(4 * lr, lr / 4),
        seeds=1,
        setting=setting,
        curves=True,
        baselines={"AdamW": ("AdamW, betas .9 .95", "AdamW"), "Muon": ("Muon",)},
        rates=rates_of(lr),
        first=first(lr),
        finding=finding,
    )


def tokens_gpt2() -> Study:
    return on_tokens(
        "Which optimizer trains a GPT-2 124M, with a vocabulary of 32,768",
        GPT2,
        finding="At 1.2e-3 AdaPM factored ends 0.009 below AdamW with 7 % of its state (one seed). That is AdamW's "
        "best rate: at 6e-4 it ends 0.106 higher, at 2.4e-3 0.128. **AdaPM has no other rate.** PartialMuon with "
        "AdaPM's table ends 0.240 below AdamW at 8e-3, the only rate that was tried. Runs of these three took 183, "
        "187 and 186 seconds on one machine. The other rows have not run.",
    )


def tokens_llama_60m() -> Study:
    return on_tokens(
        "Which optimizer trains a Llama of 60 million parameters",
        LLAMA_60M,
        2.4e-3,
        "Over three seeds AdaPM factored ends 0.014 +- 0.011 below AdamW with 10 % of its state, both at 2.4e-3, "
        "their best rate, with a worse one on both sides: at 2.1433, 2.1505 and 2.1410, AdamW at 2.1783, 2.1514 and "
        "2.1476. At that rate AdaPM with elementwise second moments, the default, ends 0.007 +- 0.007 below AdamW in "
        "the same seeds, at 2.1583, 2.1465 and 2.1528, **0.008 +- 0.006 above factored**. **Most of both is the first "
        "seed, and every other row has that seed alone, so their differences flatter them: in the other two AdamW ends "
        "0.029 lower.** AdamW fails at 9.6e-3. Without the correction, factored ends 0.237 above itself; it has that "
        "loss after 55 % of its steps. Betas .9 .999, the default, cost it 0.007. **With compact momentum, which was "
        "the default, factored ends 0.020 above**, best at 2.4e-3. There, full momentum for embeddings gains 0.016, "
        "for the head, too, and in eight bits, 0.019 more, and for queries, keys and attention outputs, with rank 5 %"
        " instead of 10 % for MLPs, 0.020 more; updates of embeddings bounded by 10 instead of 1 are no help. **At "
        "2.4e-3 compact AdaPM ends 0.022 above compact factored, with "
        "block second moments 0.032.** PartialMuon ends 0.119 below AdamW **and 0.0057 above Muon**, which ends at "
        "2.0533 (2.0649 at 4e-3). **With four fast steps, its former default, it ends 0.0030 lower**, with five of "
        "Muon's 0.0023 lower, with AdaPM's table and Muon's steps 0.0081 lower (0.017 higher at 4e-3), with four fast "
        "ones 0.0064 lower, and compact, the default before, with Muon's steps, 0.026 higher; all at 8e-3, the only "
        "rate that was tried but for those named. SCALE ends 0.568 above AdamW at 2.4e-3, the only rate that was "
        "tried: no verdict. The other rows have not run.",
    )


def tokens_llama_130m() -> Study:
    return on_tokens("Which optimizer trains a Llama of 130 million parameters", LLAMA_130M)
