"""The model, dtype and optimizer that recipes of ``fit`` and of litgpt's commands specify."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader
from torch import nn

from lightning_adapm import optim
from lightning_adapm.litgpt.model import MODEL_CONFIG
from lightning_adapm.optim import AdaPM, RoleOptimizer

_LITGPT = "lightning_adapm.litgpt.LitGPTModule"
_DTYPES = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64", "64": "float64"}
"""Dtype of the parameters by precision of the Trainer; float32 under all others."""
_LORA = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05, "lora_query": True, "lora_value": True}
"""Defaults of `litgpt finetune_lora`."""
SHAPE_THE_STATE = ("rank", "second_moment", "momentum", "roles", "unmatched", "state_dtype")


def named_model(model_name: str) -> dict[str, Any]:
    """A recipe that has nothing but one of litgpt's models."""
    return {"model": {"class_path": _LITGPT, "init_args": {"model_name": model_name}}}


def merged(files: list[str]) -> dict[str, Any]:
    """Read recipes and merge them; later ones take precedence.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is not YAML, or no recipe.
    """
    found: dict[str, Any] = {}
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"--config: there is no file {file!r}")
        try:
            # like `fit`, which reads 1e-3 as a number
            recipe = get_loader("yaml")(Path(file).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"--config: {file} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(recipe, dict):
            content = "the file is empty" if recipe is None else f"its content is a {type(recipe).__name__}"
            raise ValueError(f"--config: {file} is not a recipe: {content}; write model: {{class_path: ...}}")
        found = _overlaid(found, recipe)
    return found


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    if below.get("class_path") != above.get("class_path", below.get("class_path")):
        return dict(above)  # arguments of another class do not apply
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _overlaid(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def model_section(recipe: Mapping[str, Any], files: list[str] | None) -> dict[str, Any] | None:
    """Section ``model`` of a recipe, or its equivalent in a recipe of litgpt's own commands.

    Raises:
        ValueError: A recipe from ``files`` has no such section, or the section has no ``class_path``.
    """
    section = recipe.get("model")
    if section is None and (described := _litgpt_model(recipe)):
        return {"class_path": _LITGPT, "init_args": described}
    if files and not isinstance(section, dict):
        raise ValueError(
            f"--config: {', '.join(files)} has no `model`; write model: {{class_path: ..., init_args: ...}}"
        )
    if isinstance(section, dict) and "class_path" not in section:
        raise ValueError("--config: `model` has no class_path; write model: {class_path: ..., init_args: ...}")
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


def optimizer_options(recipe: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Options of an AdaPM under ``optimizer``, and its defaults in the place of settings that the module states."""
    section = recipe.get("optimizer")
    if not isinstance(section, dict) or str(section.get("class_path")).rpartition(".")[2] != AdaPM.__name__:
        return {}
    defaults = {name: inspect.signature(AdaPM).parameters[name].default for name in SHAPE_THE_STATE}
    settings: Mapping[str, Any] = getattr(model, "adapm_options", {})
    defaults = {name: default for name, default in defaults.items() if settings.get(name, default) != default}
    return defaults | (section.get("init_args") or {})


def named_neighbor(recipe: Mapping[str, Any]) -> tuple[type[Any], dict[str, Any]] | None:
    """Find an optimizer of this package other than AdaPM under ``optimizer``, and its options; None without one."""
    section = recipe.get("optimizer")
    if not isinstance(section, dict):
        return None
    name = str(section.get("class_path")).rpartition(".")[2]
    if name not in optim.__all__ or name in (AdaPM.__name__, RoleOptimizer.__name__):
        return None
    return getattr(optim, name), section.get("init_args") or {}


def recipe_dtype(recipe: Mapping[str, Any]) -> str:
    """Dtype of the parameters, from the precision of the Trainer or of litgpt."""
    trainer = recipe.get("trainer")
    precision = trainer.get("precision") if isinstance(trainer, dict) else recipe.get("precision")
    return _DTYPES.get(str(precision), "float32")
