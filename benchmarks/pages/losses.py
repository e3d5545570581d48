"""Tables of losses, state and time in README.md and docs/choosing-an-optimizer.md, from the results."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.pages.page import RESULTS, table

MODELS = {
    "GPT-2, 124 million parameters, tokens, 1500 steps": "GPT-2 124M, tokens",
    "Llama, 60 million parameters, tokens, 1500 steps": "Llama 60M, tokens",
    "GPT-2, 86 million parameters, bytes, 1600 steps": "GPT-2 86M, bytes",
    "Llama, 130 million parameters, finetuned on answers, 225 steps": "Llama 130M, finetuned",
}
"""Panels of ``loss_and_bytes``, and the heads of their columns."""
STEPS = "step_time-cuda-llama-3.2-1b-float32"
"""Measurement of the last column, by page: AdaPM's defaults, its former ones, PartialMuon with two long steps, with
four fast ones, with Muon's, its former defaults.
"""
DEFAULTS, COMPACT, MUON, FOUR, MUONS, FORMER = (
    f"{kind}-{STEPS}" for kind in ("h200", "compact", "float16-directions", "long-steps", "muon", "compact-muon")
)
BASE = "AdamW, fused"


@dataclass(frozen=True)
class Row:
    """A row of a table: how it is written, its label in the studies, and where its step was measured."""

    words: str
    label: str
    page: str = DEFAULTS
    name: str = ""

    def time(self, results: Path) -> str:
        """Its step relative to the fused AdamW's of the same page; empty where it was not measured, or on another GPU
        than the defaults.
        """
        page, defaults = measured(results, self.page), measured(results, DEFAULTS)
        rows = page.get("rows", {})
        own, base = (rows.get(name, {}).get("mean_ms") for name in (self.name or self.label, BASE))
        if not own or not base or processor(page) != processor(defaults):
            return ""
        ratio = own / base
        return f"{ratio:.2f} times" if ratio < 1.005 else f"**{ratio:.{2 if ratio < 2 else 1}f} times**"


def measured(results: Path, page: str) -> Mapping[str, Any]:
    """The JSON behind a page; empty if there is none."""
    file = results / f"{page}.json"
    found: Mapping[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def processor(page: Mapping[str, Any]) -> str:
    """Name of the GPU that a page was measured on."""
    return str(page.get("hardware", "")).partition(",")[0]


README_ROWS = (
    Row("AdaPM factored", "AdaPM factored"),
    Row("AdaPM factored, [compact](docs/choosing-a-policy.md)", "AdaPM factored, compact", COMPACT, "AdaPM factored"),
    Row("PartialMuon", "PartialMuon", MUON),
    Row("Muon", "Muon", FORMER),
)
CHOICE_ROWS = (
    Row('`AdaPM(second_moment="factored")`', "AdaPM factored"),
    Row("`AdaPM`", "AdaPM"),
    Row('`AdaPM(second_moment="block")`', "AdaPM block"),
    Row(
        'factored with [`momentum="compact"`](choosing-a-policy.md), rank 10 %',
        "AdaPM factored, compact",
        COMPACT,
        "AdaPM factored",
    ),
    Row("compact, elementwise", "AdaPM, compact", COMPACT, "AdaPM"),
    Row("compact, block", "AdaPM block, compact", COMPACT, "AdaPM block"),
    Row('`momentum="paper"`, rank 5 %, float32', "AdaPM, paper"),
    Row("`PartialMuon`", "PartialMuon", MUON),
    Row('`PartialMuon(newton_schulz="fast", ns_steps=4)`', "PartialMuon, 4 fast steps", FOUR),
    Row('`PartialMuon(newton_schulz="muon")`', "PartialMuon, Muon's steps", MUONS),
    Row("with AdaPM's table and rank, Muon's steps", "PartialMuon, AdaPM's table", FOUR),
    Row("compact, with Muon's steps", "PartialMuon, compact", FORMER),
    Row('`PartialMuon(momentum="full")`, which is Muon', "Muon", FORMER),
    Row("`AdamMini`", "Adam-mini"),
    Row("AdamW for LoRA of rank 16", "LoRA, rank 16"),
    Row("APOLLO-Mini", "APOLLO-Mini (apollo-torch)"),
    Row("GaLore", "GaLore (galore-torch)"),
    Row("Adafactor", "Adafactor (torch)"),
)
TABLES = {"losses": README_ROWS, "all losses": CHOICE_ROWS}
"""Sections of pages, by the words between their marks."""


def section(name: str, results: Path = RESULTS) -> str:
    """The rows of a table that ran on at least one of :data:`MODELS`."""
    panels = json.loads((results / "loss_and_bytes.json").read_text())["panels"]
    found = {title: {point["label"]: point for point in panels.get(title, ())} for title in MODELS}
    rows = []
    for row in TABLES[name]:
        points = [found[title].get(row.label) for title in MODELS]
        if any(points):
            rows.append([row.words, *map(shown, points), states(points), row.time(results)])
    return "\n".join(table(["", *MODELS.values(), "state", "time of a step"], rows))


def shown(point: Mapping[str, Any] | None) -> str:
    """A difference to AdamW: bold if it is against the row, with the number of its seeds and a star at an edge."""
    if point is None:
        return "not run"
    number, error = point["difference"], point["error"]
    spread = "" if error is None else f" ± {error:.3f}"
    text = f"{abs(number):.3f}{spread} {'higher' if number > 0 else 'lower'}"
    if number > 0:
        text = f"**{text}**"
    return f"{text} ({point['seeds']}){' *' if point['edge'] else ''}"


def states(points: list[Mapping[str, Any] | None]) -> str:
    """Percentages of AdamW's state, in the order of the columns."""
    *firsts, last = dict.fromkeys(f"{100 * point['state']:.2g}" for point in points if point)
    return f"{', '.join(firsts)} and {last} %" if firsts else f"{last} %"
