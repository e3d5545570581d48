"""``lightning-adapm plan``: bytes of optimizer state, computed before training on the meta device."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser, get_loader
from torch import nn

from lightning_adapm.commands.step import Loop, first_fitting, print_step
from lightning_adapm.litgpt.model import MODEL_CONFIG
from lightning_adapm.litgpt.module import LitGPTModule
from lightning_adapm.optim import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon
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
from lightning_adapm.trainer.recipes import recipes, with_files

_LITGPT = "lightning_adapm.litgpt.LitGPTModule"
_DTYPES = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64", "64": "float64"}
"""Dtype of the parameters by precision of the Trainer; float32 under all others."""

_LORA = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "lora_query": True, "lora_value": True}
"""Defaults of `litgpt finetune_lora`."""

NEIGHBORS: tuple[type[Any], ...] = (AdamMini, PartialMuon, LoRAPre, AdaLomo, Lomo)
"""Optimizers with a column of their own where a recipe names them."""

_SHAPE_THE_STATE = ("rank", "second_moment", "momentum", "roles", "unmatched", "state_dtype")
_DESCRIPTION = """\
Compare the optimizer state of a model before training: AdamW, Adam-mini, AdaPM, AdaPM with block second moments, and
PartialMuon. The model is built on the meta device, so no weight takes memory. With --fits, weights, gradients,
activations and transients of a training step are planned, too.

  lightning-adapm plan --model_name Llama-3-8B --dtype bfloat16
  lightning-adapm plan --config recipe:pretrain/quickstart --rank 4 --explain
  lightning-adapm plan --config recipe:finetune/llama-3-8b-full --fits 24GiB
  lightning-adapm plan --fits 24GiB
"""


class Reading(NamedTuple):
    """A model on the meta device and an optimizer, as the words of a command line describe them."""

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
        The exit status, which is 1 where a matrix has no role and AdaPM would refuse to train, and where a training
        step does not fit into the memory after ``--fits``.
    """
    parser, words = _parser(), with_files(words)
    peek = argparse.ArgumentParser(prog=parser.prog, usage=parser.usage, add_help=False, allow_abbrev=False)
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
        return _list_fitting(parser, read_bytes(source.fits))
    if not sources and not source.help:
        parser.error("which model? Give --model_name NAME (of litgpt), --config FILE or --model CLASS")
    return _report(*_read(parser, source, words), source.fits and read_bytes(source.fits))


def _read(parser: ArgumentParser, source: argparse.Namespace, words: list[str]) -> Reading:
    recipe = _named(source.model_name) if source.model_name else _merged(source.config or [])
    model = _model_section(recipe, source.config)
    settings = parser.parse_args([*([f"--model={json.dumps(model)}"] if model else []), *words], defaults=False)
    dtype = settings.get("dtype") or _recipe_dtype(recipe)
    with torch.device("meta"):
        built = parser.instantiate_classes(settings).model
        if isinstance(built, L.LightningModule):
            built.configure_model()
    built.to(getattr(torch, dtype))
    given = {name: settings[name] for name in _SHAPE_THE_STATE if name in settings}
    options = _optimizer_options(recipe, built) | given
    label = source.model_name or type(built).__name__
    return Reading(built, label, recipe, options, _neighbor(recipe), bool(settings.get("explain")))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="lightning-adapm plan",
        usage="lightning-adapm plan (--model_name NAME | --config FILE | --model CLASS | --fits SIZE) [options]",
        description=_DESCRIPTION,
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
        type=Literal["float32", "bfloat16", "float16", "float64"],
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
    others: set[str | int] = {name for name in options_of(AdaPM) if name not in _SHAPE_THE_STATE}
    parser.add_class_arguments(AdaPM, skip=others, fail_untyped=False)
    return parser


def _describe_model(model: nn.Module) -> None:
    """The model.

    Args:
        model: Class path of a module; --model.ARGUMENT overrides --model_name and --config.
    """


def _named(model_name: str) -> dict[str, Any]:
    return {"model": {"class_path": _LITGPT, "init_args": {"model_name": model_name}}}


def _merged(files: list[str]) -> dict[str, Any]:
    """Read recipes and merge them; later ones take precedence."""
    merged: dict[str, Any] = {}
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--config: there is no file {file!r}")
        try:
            recipe = get_loader("yaml")(
                Path(file).read_text(encoding="utf-8")
            )  # like `fit`, which reads 1e-3 as a number
        except yaml.YAMLError as error:
            raise ValueError(f"--config: {file} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(recipe, dict):
            raise ValueError(f"--config: {file} is not a recipe: its content is a {type(recipe).__name__}")
        merged = _overlaid(merged, recipe)
    return merged


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    if below.get("class_path") != above.get("class_path", below.get("class_path")):
        return dict(above)  # arguments of another class do not apply
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _overlaid(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _model_section(recipe: Mapping[str, Any], files: list[str] | None) -> dict[str, Any] | None:
    """Section ``model`` of a recipe, or its equivalent in a recipe of litgpt's own commands."""
    section = recipe.get("model")
    if section is None and (described := _litgpt_model(recipe)):
        return {"class_path": _LITGPT, "init_args": described}
    if files and not isinstance(section, dict):
        raise ValueError(
            f"--config: {', '.join(files)} does not say `model`; write model: {{class_path: ..., init_args: ...}}"
        )
    if isinstance(section, dict) and "class_path" not in section:
        raise ValueError(
            "--config: `model` does not say its class_path; write model: {class_path: ..., init_args: ...}"
        )
    return section


def _litgpt_model(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``LitGPTModule`` for the model of a recipe of litgpt's commands; empty where it names no model."""
    described: dict[str, Any]
    if recipe.get("model_config"):
        described = {"config": dict(recipe["model_config"])}
    elif recipe.get("model_name"):
        described = {"model_name": recipe["model_name"]}
    elif recipe.get("checkpoint_dir"):
        folder = Path(recipe["checkpoint_dir"])
        found = (folder / MODEL_CONFIG).is_file()  # before the download, the name is enough
        described = {"checkpoint_dir": str(folder)} if found else {"model_name": folder.name}
    else:
        return {}
    lora = {key: value for key, value in recipe.items() if key.startswith("lora_")}
    if lora:
        described["config"] = described.get("config", {}) | _LORA | lora
    train = recipe.get("train")
    if isinstance(train, dict) and train.get("tie_embeddings"):
        described["tie_embeddings"] = True
    return described


def _optimizer_options(recipe: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Options of an AdaPM under ``optimizer``, and its defaults in the place of settings that the module states."""
    section = recipe.get("optimizer")
    if not isinstance(section, dict) or str(section.get("class_path")).rpartition(".")[2] != AdaPM.__name__:
        return {}
    defaults = {name: inspect.signature(AdaPM).parameters[name].default for name in _SHAPE_THE_STATE}
    settings: Mapping[str, Any] = getattr(model, "adapm_options", {})
    defaults = {name: default for name, default in defaults.items() if settings.get(name, default) != default}
    return defaults | (section.get("init_args") or {})


def _neighbor(recipe: Mapping[str, Any]) -> tuple[type[Any], dict[str, Any]] | None:
    """Another optimizer of this package under ``optimizer``, and its options."""
    section = recipe.get("optimizer")
    name = str(section.get("class_path")).rpartition(".")[2] if isinstance(section, dict) else ""
    found = next((each for each in NEIGHBORS if each.__name__ == name), None)
    return None if found is None or section is None else (found, section.get("init_args") or {})


def _recipe_dtype(recipe: Mapping[str, Any]) -> str:
    """Dtype of the parameters, from the precision of the Trainer or of litgpt."""
    trainer = recipe.get("trainer")
    precision = trainer.get("precision") if isinstance(trainer, dict) else recipe.get("precision")
    return _DTYPES.get(str(precision), "float32")


def _report(
    model: nn.Module,
    label: str,
    recipe: Mapping[str, Any],
    options: Mapping[str, Any],
    neighbor: tuple[type[Any], dict[str, Any]] | None,
    every_parameter: bool,
    limit: int | None,
) -> int:
    variants, name = compare(model, **options), "AdaPM"
    make: type[Any] = AdaPM
    ours, arguments = variants[name], {**getattr(model, "adapm_options", {}), **options}
    if (chosen := _chosen(model, options, neighbor)) is not None:
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
        print(f"No {' and '.join(missing)}: the attention modules do not say their number of heads")
    print(as_text(summary_table(summarize(ours), "role", len(ours), name)))
    if every_parameter:
        print(as_text(pieces_table(ours)))
    fits = limit is None or print_step(model, recipe, make, arguments, ours.total.total, limit)
    if not ours.unmatched:
        return int(not fits)
    print(_advice(ours))
    return 1


def _chosen(
    model: nn.Module, options: Mapping[str, Any], neighbor: tuple[type[Any], dict[str, Any]] | None
) -> tuple[type[Any], dict[str, Any]] | None:
    """The optimizer that a recipe or a module names, and its options, where it is not AdaPM."""
    settings: Any = model
    if neighbor is None and getattr(model, "adapm_class", AdaPM) is not AdaPM:
        return settings.adapm_class, {**settings.adapm_options, **options}
    return neighbor


def _list_fitting(parser: ArgumentParser, limit: int) -> int:
    """Print the recipes with a training step that fits, as they are or with changes of options."""
    table = new_table()
    for header in ("Recipe", "Step", "With", "Planned"):
        table.add_column(header, justify="right" if header == "Planned" else "left")
    for name, file in recipes().items():
        recipe = _merged([str(file)])
        if not {"model", "model_name"} & recipe.keys() and "checkpoint_dir" not in recipe:
            continue  # changes to other recipes
        words = [f"--config={file}"]
        try:
            reading = _read(parser, argparse.Namespace(model_name=None, config=[str(file)]), words)
        except (FileNotFoundError, ValueError):  # it starts from the result of another
            continue
        if type(reading.model) is not LitGPTModule:
            continue
        chosen = _chosen(reading.model, reading.options, reading.neighbor)
        make, options = chosen or (AdaPM, {**reading.model.adapm_options, **reading.options})
        if row := first_fitting(reading.model, Loop.of(recipe, reading.model, options), make, options, limit):
            table.add_row(name, *row)
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
