"""Tables of memory of ``docs/choosing-an-optimizer.md``, by the plan: ``python -m benchmarks.optimizer_memory``."""

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
    '`AdaPM(second_moment="factored")`': lambda params: AdaPM(params, second_moment="factored"),
    '`AdaPM(second_moment="block")`': lambda params: AdaPM(params, second_moment="block"),
    "`AdamMini`": AdamMini,
    "`PartialMuon`": PartialMuon,
    "`PartialMuon(rank=0.05)`": lambda params: PartialMuon(params, rank=0.05),
    '`PartialMuon(momentum="full")`': lambda params: PartialMuon(params, momentum="full"),
    "`LoRAPre`": LoRAPre,
    '`LoRAPre(variant="muon")`': lambda params: LoRAPre(params, variant="muon"),
    "`AdaLomo`": AdaLomo,
    "`Lomo`": Lomo,
}
LINES = (
    "torch.optim.AdamW(model.parameters(), lr=1e-3)",
    'AdaPM(model.named_parameters(), lr=1e-3, second_moment="factored")',
    'AdaPM(model.named_parameters(), lr=1e-3, second_moment="factored", update_in_backward=True)',
    "AdaLomo(model.named_parameters(), lr=2e-2)",
)
"""Lines to paste, from the most memory to the least."""


def model(name: str) -> GPT:
    names = {"TinyLlama-1.1B": "tiny-llama-1.1b"}
    with torch.device("meta"):
        return GPT(Config.from_name(names.get(name, name)))


def budget() -> str:
    """Bytes of parameters, gradients and state by the line to paste; no gradients where they are never all held."""
    models = {name: model(name) for name in MODELS}
    models["Llama-3-8B, bfloat16"] = model("Llama-3-8B").to(torch.bfloat16)
    lines = [f"| {' | '.join(models)} | write |", "|---" * (len(models) + 1) + "|"]
    for line in LINES:
        cells = [show_bytes(trained_bytes(line, built)) for built in models.values()]
        lines.append(f"| {' | '.join(cells)} | `{line}` |")
    return "\n".join(lines)


def trained_bytes(line: str, model: GPT) -> int:
    """Bytes of what a line trains: parameters, state, and gradients if all of them exist together."""
    parameters = sum(param.numel() * param.element_size() for param in model.parameters())
    optimizer = eval(line, {"torch": torch, "model": model, "AdaPM": AdaPM, "AdaLomo": AdaLomo})  # tried as shown
    if not isinstance(optimizer, RoleOptimizer):
        return 2 * parameters + explain(model).adamw_in_dtype.total
    return parameters * (1 if optimizer.update_in_backward else 2) + explain(optimizer).total.total


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
    """Write both tables into the page, between their marks."""
    page = PAGE.read_text()
    for name, made in (("budget", budget()), ("memory", table())):
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        after = rest.partition("<!-- end -->")[2]
        page = f"{before}<!-- {name} -->\n{made}\n<!-- end -->{after}"
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
