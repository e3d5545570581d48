"""Writes docs/architectures.md: ``PYTHONPATH=tests/helpers python tests/helpers/architectures.py``."""

import re
import textwrap
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import hf_sweep
import torch
import transformers
from litgpt.config import configs
from models import litgpt_families, litgpt_on_meta

from lightning_adapm import AdaPM

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

HEAD = """\
# Architectures

Roles that AdaPM finds in every configuration of litgpt {litgpt}, and in every model class of the Auto classes in
transformers {transformers}, with default configurations of fewer layers on the meta device (torch {torch}).
`PYTHONPATH=tests/helpers python tests/helpers/architectures.py` writes this page; `make test-slow` checks it.

| result | classes of transformers |
|---|---|
{counts}

- **Right by rule**: `AdaPM(model.parameters())` works, with elementwise and block second moments. Embeddings and norms
  are compared with the modules' types.
- **Taught**: some matrices have no role in AdaPM's table (state-space and recurrent mixers, convolutions other than
  patches) or an ambiguous name. They are refused until `roles=` gives their role; the page shows a sufficient one.
  `"full"` trains those matrices as AdamW does, which is always right.
- **Refused**: mostly convolutional networks. `unmatched="full"` or `unmatched="low_rank"` trains them, too.

All {litgpt_count} configurations of litgpt are right by rule ({litgpt_shapes} different architectures).

## Right by rule

These are the model types of all classes that no table below lists.

In a forward pass, as far as it runs without data, queries, keys, values and attention outputs agree with the rules (the
inputs of the softmax, the values that it weighs, and the next matrix):

{confirmed}

Only embeddings and norms were compared:

{others}
"""


def page(results):
    """The page for the results of :func:`hf_sweep.sweep`."""
    for name in litgpt_families():
        AdaPM(litgpt_on_meta(name).parameters(), second_moment="block")
    outcomes = ("by rule", "taught", "refused", "not built")
    count = {outcome: sum(result.outcome == outcome for result in results.values()) for outcome in outcomes}
    kinds = hf_sweep.model_classes()
    seen = {kinds[name] for name, result in results.items() if result.confirmed}
    groups = defaultdict(lambda: defaultdict(list))
    for name, result in results.items():
        key = {
            "by rule": "",
            "taught": "<br>".join(_code(f'r"{pattern}": "{role}"') for pattern, role in result.taught.items()),
            "refused": _names(result.names),
            "not built": _reason(result.names[0]) if result.names else "",
        }[result.outcome]
        groups[result.outcome][key].append(name)
    by_rule = dict.fromkeys(kinds[name] for name in groups["by rule"][""])
    text = HEAD.format(
        litgpt=version("litgpt"),
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        counts="\n".join(f"| {outcome} | {number} |" for outcome, number in count.items()),
        litgpt_count=len(configs),
        litgpt_shapes=len(litgpt_families()),
        confirmed=_listed(kind for kind in by_rule if kind in seen),
        others=_listed(kind for kind in by_rule if kind not in seen),
    )
    for outcome, column in (("taught", "`roles=`"), ("refused", "matrices"), ("not built", "why")):
        text += f"\n## {outcome.capitalize()}\n\n| {column} | classes |\n|---|---|\n"
        text += "".join(f"| {key} | {', '.join(names)} |\n" for key, names in groups[outcome].items())
    return text


def _listed(kinds):
    return textwrap.fill(", ".join(kinds), 128, break_on_hyphens=False)


def _code(text):
    return "`" + text.replace("|", "\\|") + "`"


def _reason(error):
    needs = re.search(r"requires the (\S+) library", error)
    return f"needs {needs[1]}" if needs else error.replace("|", "\\|")[:110]


def _names(names, most=8):
    """The ends of names, which classes with and without a head have in common."""
    names = list(dict.fromkeys(".".join(name.split(".")[-4:]) for name in names))
    shown = ", ".join(f"`{name}`" for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


if __name__ == "__main__":
    PAGE.write_text(page(hf_sweep.sweep()), encoding="utf-8")
