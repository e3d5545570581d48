"""``lightning-adapm plan``: bytes of optimizer state, computed before training on the meta device."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn

from lightning_adapm.commands.sections import (
    SHAPE_THE_STATE,
    merged,
    model_section,
    named_model,
    named_neighbor,
    optimizer_options,
    recipe_dtype,
)
from lightning_adapm.commands.step import Loop, first_fitting, print_step
from lightning_adapm.litgpt.module import LitGPTModule
from lightning_adapm.optim import AdaPM
from lightning_adapm.optim.options import options_of
from lightning_adapm.report.explain import VARIANTS, Explanation, compare, explain
from lightning_adapm.report.tables import (
    as_text,
    comparison_table,
    new_table,
    pieces_table,
    read_bytes,
    show_count,
    summarize,
    summary_table,
)
from lightning_adapm.roles.assign import suggested_roles
from lightning_adapm.trainer.errors import CommandParser
from lightning_adapm.trainer.recipes import recipes, with_files

_DESCRIPTION = """\
Compare the optimizer state of a model before training: AdamW, Adam-mini, AdaPM, AdaPM with factored second moments,
and PartialMuon. The model is built on the meta device, so no weight takes memory. With --fits, weights, gradients,
activations and transients of a training step are planned, too.

  lightning-adapm plan --model_name Llama-3-8B --dtype bfloat16
  lightning-adapm plan --config recipe:pretrain/quickstart --rank 4 --explain
  lightning-adapm plan --config recipe:finetune/llama-3-8b-full --fits 24GiB
  lightning-adapm plan --fits 24GiB
"""


class Described(NamedTuple):
    """A model on the meta device and an optimizer, as a command line describes them."""

    model: nn.Module
    label: str
    recipe: Mapping[str, Any]
    options: Mapping[str, Any]
    """Options of AdaPM that replace the module's own settings."""
    neighbor: tuple[type[Any], dict[str, Any]] | None
    """Another optimizer of this package, and its options."""
    every_parameter: bool


def run(words: list[str]) -> int:
    """Print the plan that the words after ``plan`` specify.

    Returns:
        The exit status, which is 1 where a matrix has no role and training would be refused, and where a training
        step does not fit into the memory after ``--fits``.
    """
    parser, words = _parser(), with_files(words)
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    peek.add_argument("--model_name")
    peek.add_argument("--config", action="append")
    peek.add_argument("--model")
    peek.add_argument("--fits")
    peek.add_argument("-h", "--help", action="store_true")
    source, rest = peek.parse_known_args(words)
    sources = [f"--{name}" for name in ("model_name", "config", "model") if getattr(source, name)]
    if len(sources) > 1:
        parser.error(f"{' and '.join(sources)} each describe the model; give one of them")
    if not sources and source.fits and not rest:
        return _list_fitting(parser, _limit(source.fits))
    if not sources and not source.help:
        parser.parse_args(["--model=torch.nn.Identity", *rest], defaults=False)  # a misspelled option comes first
        parser.error("which model? Give --model_name NAME (of litgpt), --config FILE or --model CLASS")
    return _report(_read(parser, source, words), _limit(source.fits) if source.fits else None)


def _limit(size: str) -> int:
    """Bytes after ``--fits``."""
    try:
        return read_bytes(size)
    except ValueError as error:
        raise ValueError(f"--fits: {error}") from None


def _read(parser: CommandParser, source: argparse.Namespace, words: list[str]) -> Described:
    recipe = named_model(source.model_name) if source.model_name else merged(source.config or [])
    model = model_section(recipe, source.config)
    settings = parser.parse_args([*([f"--model={json.dumps(model)}"] if model else []), *words], defaults=False)
    dtype = settings.get("dtype") or recipe_dtype(recipe)
    with torch.device("meta"):
        built = parser.instantiate_classes(settings).model
        if isinstance(built, L.LightningModule):
            built.configure_model()
    built.to(getattr(torch, dtype))
    given = {name: settings[name] for name in SHAPE_THE_STATE if name in settings}
    options = optimizer_options(recipe, built) | given
    label = source.model_name or type(built).__name__
    return Described(built, label, recipe, options, named_neighbor(recipe), bool(settings.get("explain")))


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="lightning-adapm plan",
        usage="lightning-adapm plan (--model_name NAME | --config FILE | --model CLASS | --fits SIZE) [options]",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # type: ignore[arg-type]
    )
    parser.add_argument("--model_name", type=str, help="one of litgpt's names")
    parser.add_argument(
        "--config",
        action="append",
        help="a recipe of `lightning-adapm fit` or `litgpt pretrain`, a file or recipe:NAME; several apply in order",
    )
    # a function, because add_argument refuses a class that has an argument without a type
    parser.add_function_arguments(_describe_model, fail_untyped=False)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        help="dtype of the parameters (default: the recipe's precision, else float32)",
    )
    parser.add_argument(
        "--fits",
        type=str,
        help="memory of a GPU, such as 24GiB: whether a training step fits; without a model, which recipes do",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="also print every parameter with its role, the reason for it, and its bytes",
    )
    others: set[str | int] = {name for name in options_of(AdaPM) if name not in SHAPE_THE_STATE}
    parser.add_class_arguments(AdaPM, skip=others, fail_untyped=False)
    return parser


def _describe_model(model: nn.Module) -> None:
    """The model.

    Args:
        model: Class path of a module; --model.ARGUMENT overrides --model_name and --config.
    """


def _report(described: Described, limit: int | None) -> int:
    """Print the plan of what was described, and whether a step fits into ``limit`` bytes; return the exit status."""
    model, label, recipe, options, _, every_parameter = described
    variants, name = compare(model, **options), "AdaPM"
    make: type[Any] = AdaPM
    ours, arguments = variants[name], {**getattr(model, "adapm_options", {}), **options}
    if (chosen := _chosen(described)) is not None:
        make, arguments = chosen
        name = make.__name__
        ours = variants[name] = explain(make(model.named_parameters(), **arguments))
    totals = {"AdamW": ours.adamw_in_dtype} | {name: variant.total for name, variant in variants.items()}
    dtypes = ", ".join(dict.fromkeys(str(row.dtype).removeprefix("torch.") for row in ours))
    frozen = f", and {show_count(ours.frozen)} frozen" if ours.frozen else ""
    print(f"{label}: {show_count(ours.parameters)} parameters in {dtypes}{frozen}")
    references = {"AdamW in float32": ours.adamw} | {f"AdamW in {dtypes}": ours.adamw_in_dtype}
    print(as_text(comparison_table(totals, references)))
    if missing := [name for name in VARIANTS if name not in variants]:
        print(f"No {' and '.join(missing)}: no attention module has a number of heads")
    print(as_text(summary_table(summarize(ours), "role", len(ours), name)))
    if every_parameter:
        print(as_text(pieces_table(ours)))
    fits = limit is None or print_step(model, recipe, make, arguments, ours.total.total, limit)
    if not ours.unmatched or arguments.get("unmatched", "error") != "error":
        return int(not fits)
    print(_advice(ours))
    return 1


def _chosen(described: Described) -> tuple[type[Any], dict[str, Any]] | None:
    """The optimizer that a recipe or a module names, and its options, where it is not AdaPM."""
    model: Any = described.model
    if described.neighbor is None and getattr(model, "adapm_class", AdaPM) is not AdaPM:
        return model.adapm_class, {**model.adapm_options, **described.options}
    return described.neighbor


def _list_fitting(parser: CommandParser, limit: int) -> int:
    """Print the recipes with a training step that fits, as they are or with changes of options.

    Raises:
        ModuleNotFoundError: litgpt, whose models they have, is not installed.
    """
    if importlib.util.find_spec("litgpt") is None:
        raise ModuleNotFoundError("--fits without a model plans the recipes: pip install 'lightning-adapm[litgpt]'")
    table = new_table()
    for header in ("Recipe", "Step", "With", "Planned"):
        table.add_column(header, justify="right" if header == "Planned" else "left")
    for name, file in recipes().items():
        recipe = merged([str(file)])
        if not {"model", "model_name"} & recipe.keys() and "checkpoint_dir" not in recipe:
            continue  # changes to other recipes
        words = [f"--config={file}"]
        try:
            found = _read(parser, argparse.Namespace(model_name=None, config=[str(file)]), words)
        except (FileNotFoundError, ValueError):  # it starts from the result of another
            continue
        model = found.model
        if type(model) is not LitGPTModule:
            continue
        make, options = _chosen(found) or (AdaPM, {**model.adapm_options, **found.options})
        if row := first_fitting(model, Loop.of(recipe, model, options), make, options, limit):
            table.add_row(name, *row)
    if not table.row_count:
        print("No recipe fits. For another model, add --model_name NAME, --config FILE or --model CLASS.")
        return 1
    print(as_text(table))
    return 0


def _advice(ours: Explanation) -> str:
    roles = json.dumps(suggested_roles((row.name, row.why) for row in ours.unmatched))
    return (
        f"{ours.advice}\n"
        f"Here that is --roles='{roles}' or --unmatched=full,\n"
        f"in a recipe `roles: {roles}` or `unmatched: full`, under model.init_args.adapm or optimizer.init_args.\n"
        "Until then training is refused; the tables above count these matrices with full momentum."
    )
