"""The memory table of ``docs/choosing-an-optimizer.md``, by the plan: ``python -m benchmarks.optimizer_memory``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from litgpt import GPT, Config

from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon, explain
from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.report.tables import show_bytes, show_saving

PAGE = Path(__file__).parents[1] / "docs" / "choosing-an-optimizer.md"
MODELS = ("pythia-160m", "TinyLlama-1.1B", "Llama-3-8B")
OPTIMIZERS: dict[str, Callable[[Any], RoleOptimizer]] = {
    "`AdaPM`": AdaPM,
    '`AdaPM(second_moment="block")`': lambda params: AdaPM(params, second_moment="block"),
    '`AdaPM(second_moment="factored")`': lambda params: AdaPM(params, second_moment="factored"),
    "`AdamMini`": AdamMini,
    "`PartialMuon`": PartialMuon,
    '`PartialMuon(state_dtype="bfloat16")`': lambda params: PartialMuon(params, state_dtype="bfloat16"),
    '`PartialMuon(momentum="full")`': lambda params: PartialMuon(params, momentum="full"),
    "`LoRAPre`": LoRAPre,
    '`LoRAPre(variant="muon")`': lambda params: LoRAPre(params, variant="muon"),
    "`AdaLomo`": AdaLomo,
    "`Lomo`": Lomo,
}


def model(name: str) -> GPT:
    names = {"TinyLlama-1.1B": "tiny-llama-1.1b"}
    with torch.device("meta"):
        return GPT(Config.from_name(names.get(name, name)))


def table() -> str:
    """State of every optimizer for every model, parameters in float32, and what it saves of AdamW's."""
    models = {name: model(name) for name in MODELS}
    reference = {name: explain(built).adamw for name, built in models.items()}
    lines = [f"| | {' | '.join(MODELS)} |", "|---" * (len(MODELS) + 1) + "|"]
    cells = [show_bytes(reference[name].total) for name in MODELS]
    lines.append(f"| `torch.optim.AdamW` | {' | '.join(cells)} |")
    for label, make in OPTIMIZERS.items():
        totals = {name: explain(make(built.named_parameters())).total.total for name, built in models.items()}
        cells = [f"{show_bytes(size)} ({show_saving(size, reference[name].total)})" for name, size in totals.items()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Write the table into the page, between its marks."""
    before, _, rest = PAGE.read_text().partition("<!-- memory -->\n")
    after = rest.partition("<!-- end -->")[2]
    PAGE.write_text(f"{before}<!-- memory -->\n{table()}\n<!-- end -->{after}")


if __name__ == "__main__":
    main()
