"""Models of some 100 million parameters: does AdaPM reach AdamW's best there, and which part of it decides that?"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.decoder import Shape
from benchmarks.studies.base import BESIDE, BETAS95, GPT2_124M, Study, adamw, adapm

AT_SIZE = dataclasses.replace(GPT2_124M, steps=1600, val_windows=256)
LLAMA_AT_SIZE = dataclasses.replace(
    AT_SIZE, shape=Shape(layers=16, width=768, n_head=12, context=1024, llama=True, n_query_groups=4)
)
LOW = {"embedding": "low_rank", "attn_out": "low_rank"}
"""What the paper gives no momentum."""


def clamped(**options: Any) -> tuple[str, Mapping[str, Any]]:
    """AdaPM as it is but for some options."""
    return adapm(betas=BETAS95, **options)


def damped(momentum: dict[str, str] | None = None, **options: Any) -> tuple[str, Mapping[str, Any]]:
    """The denominator beside the clamp, low-rank momentum where the paper has none."""
    fixed = {"betas": BETAS95, "damping": 1.0}
    return "trial", {**fixed, "momentum": LOW | (momentum or {}), **options}


BASELINES = {"AdamW": ("AdamW",), "Adam-mini": ("Adam-mini",)}
ROWS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "AdamW": adamw(0.9, 0.95),
    "AdaPM, damped": damped(),
    "AdaPM, damped, embedding full": damped({"embedding": "full"}),
    "AdaPM, low-rank for none": clamped(momentum=LOW),
    "AdaPM, damped, embedding none": damped({"embedding": "none"}),
    "AdaPM, damped, rank 10%": damped(rank=0.1),
    "AdaPM, damped, attn_out none": damped({"attn_out": "none"}),
    "AdaPM, paper": clamped(),
    "AdaPM, damped, block": damped(second_moment="block"),
    "Adam-mini": clamped(momentum="full", second_moment="block"),
    "AdaPM, damped, no clamp": damped(clip_threshold=None),
    "AdaPM, damped, every step": damped(update_proj_gap=1),
    "AdaPM, damped by 4": damped(damping=4.0),
    "AdaPM, damped, attn_out full": damped({"attn_out": "full"}),
    "AdaPM, damped, rank 25%": damped(rank=0.25),
    "AdaPM, low-rank for none, embedding full": clamped(momentum=LOW | {"embedding": "full"}),
    "AdaPM, low-rank for none, embedding full, bfloat16": clamped(
        momentum=LOW | {"embedding": "full"}, state_dtype="bfloat16"
    ),
    "AdaPM, paper, damped": damped({"embedding": "none", "attn_out": "none"}),
    "AdaPM, damped, factored": damped(second_moment="factored"),
    "AdaPM, damped, every 100": damped(update_proj_gap=100),
    "AdaPM, damped, rank 3%": damped(rank=0.03),
    "AdaPM, damped, value low-rank": damped({"value": "low_rank"}),
    "AdaPM, damped, betas .9 .99": damped(betas=[0.9, 0.99]),
}


def at_size() -> Study:
    """In the order in which the rows say most."""
    return Study(
        "Does AdaPM reach AdamW's best, and AdaPM block Adam-mini's, on a GPT-2-like model of 86 million parameters"
        " after 1600 steps, and which part of it decides that?",
        ROWS,
        lrs=(1.2e-3, 6e-4, 1.8e-3),
        edge=(2.4e-3,),
        seeds=1,
        setting=AT_SIZE,
        needs_data=True,
        curves=True,
        baselines=BASELINES,
        first=(
            ("AdamW", 1.2e-3, 0),
            ("AdaPM, damped", 1.2e-3, 0),
            ("AdaPM, damped, embedding full", 1.2e-3, 0),
            ("AdamW", 1.8e-3, 0),
            ("AdamW", 1.2e-3, 1),
            ("AdaPM, low-rank for none, embedding full, bfloat16", 1.2e-3, 0),
            ("AdaPM, damped, embedding full", 1.2e-3, 1),
            ("AdamW", BESIDE, 0),
            ("AdaPM, low-rank for none, embedding full, bfloat16", 1.2e-3, 1),
            ("AdamW", 1.2e-3, 2),
            ("AdaPM, low-rank for none, embedding full, bfloat16", 1.2e-3, 2),
            ("AdaPM, damped, embedding full", 1.2e-3, 2),
        ),
    )


def at_size_llama() -> Study:
    return Study(
        "And on a Llama-like model of 100 million parameters?",
        ROWS,
        lrs=(1.2e-3, 6e-4, 1.8e-3),
        edge=(),
        seeds=1,
        setting=LLAMA_AT_SIZE,
        needs_data=True,
        curves=True,
        baselines=BASELINES,
    )


def muon(**options: Any) -> tuple[str, Mapping[str, Any]]:
    return "PartialMuon", options


HALF = {"low_rank": "bfloat16"}
MUON_ROWS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "Muon": muon(momentum="full"),
    "PartialMuon": muon(),
    "PartialMuon, rank 10%": muon(rank=0.1),
    "PartialMuon, rank 25%": muon(rank=0.25),
    "PartialMuon, attn_out low-rank": muon(momentum={"attn_out": "low_rank"}),
    "PartialMuon, elementwise": muon(second_moment="elementwise"),
    "PartialMuon, momentum .9": muon(mu=0.9),
    "PartialMuon, every 5": muon(update_proj_gap=5),
    "PartialMuon, factors in bfloat16": muon(state_dtype=HALF),
    "PartialMuon, rank 2%": muon(rank=0.02),
    "PartialMuon, every step": muon(update_proj_gap=1),
    "PartialMuon, every 50": muon(update_proj_gap=50),
    "PartialMuon, value low-rank": muon(momentum={"value": "low_rank"}),
    "PartialMuon, embedding low-rank": muon(momentum={"embedding": "low_rank"}),
    "PartialMuon, embedding none": muon(momentum={"embedding": "none"}),
    "Muon (torch)": ("Muon", {"adjust_lr_fn": "match_rms_adamw"}),
    "AdamW": adamw(0.9, 0.95),
}


def partial_muon() -> Study:
    """Learning rates are Muon's; AdamW's runs are those of :func:`at_size`."""
    return Study(
        "How close does PartialMuon come to Muon, and what of it decides that?",
        MUON_ROWS,
        lrs=(4e-3, 2e-3, 8e-3),
        edge=(),
        seeds=1,
        setting=AT_SIZE,
        needs_data=True,
        curves=True,
        baselines={"Muon": ("Muon",), "AdamW": ("AdamW",)},
        rates={"AdamW": (1.2e-3, 1.8e-3, 2.4e-3)},
        first=(
            ("Muon", 4e-3, 0),
            ("PartialMuon", 4e-3, 0),
            ("PartialMuon, rank 10%", 4e-3, 0),
            ("PartialMuon", 8e-3, 0),
            ("PartialMuon", 2e-3, 0),
            ("Muon", 2e-3, 0),
            ("PartialMuon, attn_out low-rank", 4e-3, 0),
            ("Muon", 8e-3, 0),
        ),
    )
