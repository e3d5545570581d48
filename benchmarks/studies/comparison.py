"""AdaPM compared with every alternative, and outside of transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.studies.base import ADAMW, BESIDE_ADAMW, BETAS95, GPT2_SMALL, Study, muon, paper
from benchmarks.studies.decoder import Shape
from benchmarks.studies.elsewhere import Images, Recurrent
from benchmarks.studies.setting import Setting

LOW_RANK = {"rank": 0.25, "update_proj_gap": 200, "proj_type": "std"}
"""Options recommended by GaLore's and APOLLO's papers: a quarter of the width, projected anew every 200 steps."""
PEERS = {
    **ADAMW,
    "AdaPM, paper": paper(betas=BETAS95),
    "AdaPM block, paper": paper(betas=BETAS95, second_moment="block"),
    "AdaPM factored, paper": paper(betas=BETAS95, second_moment="factored"),
    "Adafactor (torch)": ("Adafactor", {}),
    "Muon (torch)": ("Muon", {"adjust_lr_fn": "match_rms_adamw"}),
    "Adam-mini (adam_mini)": ("adam_mini", {"betas": BETAS95}),
    "AdamMini (this package)": ("AdamMini", {"betas": BETAS95}),
    "GaLore (galore-torch)": ("GaLore", {**LOW_RANK, "betas": BETAS95, "scale": 0.25}),
    "APOLLO (apollo-torch)": (
        "APOLLO",
        {**LOW_RANK, "betas": BETAS95, "scale": 1.0, "proj": "random", "scale_type": "channel"},
    ),
    "PartialMuon, rank 5%": muon(),
    "LoRA-Pre": ("LoRAPre", {"betas": BETAS95}),
    "LoRA-Pre, Muon": ("LoRAPre", {"betas": BETAS95, "variant": "muon"}),
    "AdaLomo": ("AdaLomo", {"update_in_backward": False}),
}
UPDATED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "LoRA-Pre, updated factors": ("LoRAPre trial", {"betas": BETAS95}),
    "LoRA-Pre, updated in the momentum": ("LoRAPre trial", {"betas": BETAS95, "moments": ["first"]}),
    "LoRA-Pre, updated in the second moment": ("LoRAPre trial", {"betas": BETAS95, "moments": ["second"]}),
}
"""LoRA-Pre's Adam variant with factors that the step's own gradient has updated."""
RATES = {
    "Adafactor (torch)": (3e-3, 1e-2, 2e-2, 4e-2),
    "Muon (torch)": (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    "PartialMuon, rank 5%": (4e-3, 8e-3, 1.6e-2, 3.2e-2, 2e-3),
    "GaLore (galore-torch)": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    "APOLLO (apollo-torch)": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    **dict.fromkeys(("LoRA-Pre", *UPDATED), (5e-4, 2.5e-4, 1e-3, 1.25e-4, 2e-3)),
    "LoRA-Pre, Muon": (4e-3, 8e-3, 1.6e-2, 2e-3, 3.2e-2),
    "AdaLomo": (5e-3, 1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1),
}
"""Learning rates of optimizers for which they mean something else than for AdamW."""


def convergence() -> Study:
    return Study(
        "How fast does each optimizer train, at its own best learning rate, by steps, bytes and seconds?",
        {**PEERS, **UPDATED},
        lrs=(5e-4, 1e-3, 2e-3, 3e-3),
        edge=(4e-3, 6e-3, 8e-3),
        seeds=4,
        setting=dataclasses.replace(GPT2_SMALL, points=20),
        curves=True,
        baselines=BESIDE_ADAMW,
        rates=RATES,
        finding=(
            "With 4 seeds, betas .9 .95: AdaPM is 0.038 +- 0.010 below AdamW's best, factored 0.027 +- 0.015, and "
            "AdaPM block, 0.023 +- 0.014 above it, is below Adam-mini's best. torch's Muon is 0.494 below AdamW and "
            "PartialMuon of rank 5 % 0.418, both with a worse rate on either side; LoRA-Pre's Muon, with its shape "
            "factor, is 0.27 below at the highest rate tried. On Llama-3.2-1B's shapes torch's Muon takes 9 times as "
            "long for a step as AdamW's fused one (step_time), AdaPM 0.90 times. GaLore and APOLLO are 0.09 and 0.12 "
            "above AdamW at the highest rates tried, AdaLomo 0.26, LoRA-Pre with Adam 0.41, torch's Adafactor 0.43. "
            "adam_mini spikes at 2e-3 where this package's AdamMini does not. LoRA-Pre with Adam is best at 5e-4; "
            "with the factors that a step has updated it is 0.026 +- 0.011 lower there, with those in the momentum "
            "alone 0.032 +- 0.011 lower, in the second moment alone 0.012 +- 0.009 higher. That is a tenth of what it "
            "is behind AdamW, with updates of up to 87,000 times the learning rate instead of 3,600, so the default "
            "stays. Seconds are of "
            "processes that shared the GPU."
        ),
    )


def instructions() -> Study:
    """Questions are longer than the other texts' windows."""
    setting = Setting(Shape(layers=4, width=192, n_head=6, context=512), steps=300, points=20)
    return Study(
        "And when weights pretrained with AdamW are finetuned on questions and answers (loss on the answers alone)?",
        PEERS,
        lrs=(3e-4, 1e-3, 2e-3),
        edge=(),
        seeds=4,
        setting=setting,
        needs_data=True,
        pretrained=True,
        curves=True,
        baselines=BESIDE_ADAMW,
        rates={label: rates[:3] for label, rates in RATES.items()},
        finding=(
            "As in pretraining (4 seeds, gsm8k, betas .9 .95): AdaPM is below AdamW, by 0.016 +- 0.004 at 1e-3 and "
            "0.035 +- 0.006 at 2e-3, factored by 0.016 +- 0.001 there; AdaPM block is 0.028 +- 0.005 above AdamW and "
            "0.022 below Adam-mini. torch's Muon is 0.27 below AdamW; GaLore is 0.14 above it, APOLLO 0.15, AdaLomo "
            "0.16, LoRA-Pre 0.17, torch's Adafactor 0.21. But for LoRA-Pre with Adam, "
            "every row's best rate is the highest it was run at."
        ),
    )


def recurrent() -> Study:
    """Study of recurrent weights, which need explicit roles."""
    taught = {policy: {"roles": {r"weight_(ih|hh)": policy}} for policy in ("full", "low_rank", "none")}
    rows = {f"AdaPM, recurrent weights {policy}": paper(betas=BETAS95, **options) for policy, options in taught.items()}
    return Study(
        "Outside transformers: an LSTM language model. Its matrices have no role and are refused until roles= says what"
        " they get.",
        {**ADAMW, **rows, "AdaPM block, recurrent weights low_rank": paper(
            betas=BETAS95, second_moment="block", **taught["low_rank"]
        )},
        lrs=(1e-3, 2e-3, 4e-3),
        edge=(8e-3,),
        setting=Setting(Recurrent(layers=1, width=256, context=128), steps=600),
        baselines=BESIDE_ADAMW,
        finding=(
            "With 4 seeds, at the highest rate tried, which is everyone's best: without momentum of the recurrent "
            "weights 0.064 +- 0.003 below AdamW with the same betas, low-rank 0.022 +- 0.003 below it, full (what "
            "differs then is the embedding) 0.038 +- 0.001 above it, AdaPM block with low-rank 0.018 +- 0.009 above "
            "it. At 1e-3 all are behind AdamW, by 0.014 to 0.034: what momentum is worth depends on the rate."
        ),
    )  # fmt: skip


def images() -> Study:
    rows = {
        f"AdaPM, convolutions {policy}": paper(betas=BETAS95, unmatched=policy)
        for policy in ("full", "low_rank", "none")
    }
    return Study(
        "Outside transformers: a small ResNet on images made here (synthetic classes with noise, no photographs). Its"
        " convolutions are refused until unmatched= says what they get.",
        {**ADAMW, **rows, "AdaPM block, convolutions low_rank": paper(
            betas=BETAS95, second_moment="block", unmatched="low_rank"
        )},
        lrs=(3e-4, 1e-3, 3e-3),
        edge=(1e-2,),
        setting=Setting(Images(blocks=2, width=32), steps=600, batch=64, val_windows=2000),
        baselines=BESIDE_ADAMW,
        finding=(
            "With 4 seeds, each at its best rate: convolutions with low-rank momentum end 0.28 +- 0.03 below AdamW, "
            "with block second moments 0.16 +- 0.02 below it, full momentum 0.034 +- 0.004 below it, and none 0.50 +- "
            "0.02 above it: no momentum is a bad choice there. The images are noise around patterns, and 20,000 of "
            "them are seen twice: what generalises from photographs is another question."
        ),
    )  # fmt: skip
