"""litgpt models from configurations and checkpoint directories; litgpt is imported on first use."""

from __future__ import annotations

import dataclasses
import difflib
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from lightning_adapm.litgpt.weights import attach_weights, matching_weights, parameters_without_values
from lightning_adapm.optim.options import instead_of
from lightning_adapm.trainer.config import without_text_none

if TYPE_CHECKING:
    from litgpt import GPT, Config
    from litgpt.tokenizer import Tokenizer

WEIGHTS, MODEL_CONFIG = "lit_model.pth", "model_config.yaml"


def litgpt_config(
    model_name: str | None, config: dict[str, Any] | None = None, checkpoint_dir: str | None = None
) -> Config:
    """Build a ``litgpt.Config`` from a name, from fields, from both, or else from a checkpoint directory.

    Args:
        model_name: One of litgpt's names.
        config: Fields of ``litgpt.Config``. Fields of ``litgpt.lora.Config`` make the result one of those.
        checkpoint_dir: Directory whose ``model_config.yaml`` is read if neither a name nor fields are given.

    Raises:
        ModuleNotFoundError: litgpt is not installed.
        FileNotFoundError: The checkpoint directory is needed and lacks its ``model_config.yaml``.
        ValueError: litgpt has no such name or field, or the fields do not fit together.
    """
    try:
        from litgpt import Config, lora
        from litgpt.config import name_to_config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LitGPTModule needs litgpt: pip install 'lightning-adapm[litgpt]'") from error
    fields = without_text_none(config or {})
    described = {name for name in fields if not name.startswith("lora_")}
    if model_name is None and not described and checkpoint_dir is not None:
        saved = yaml.safe_load(checkpoint_file(checkpoint_dir, MODEL_CONFIG).read_text(encoding="utf-8"))
        fields = saved | fields
    elif model_name is None and not described:
        raise ValueError(
            "LitGPTModule has no model; give `model_name` (such as 'pythia-14m'), `config` (fields of litgpt.Config),"
            " both, or `checkpoint_dir`"
        )
    kind = lora.Config if any(name.startswith("lora_") for name in fields) else Config
    known = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            raise ValueError(f"`config`: litgpt.Config has no field {name!r}; {instead_of(name, known, 'fields')}")
    try:
        return kind(**fields) if model_name is None else kind.from_name(model_name, **fields)
    except (AssertionError, TypeError, ValueError) as error:
        # litgpt checks some fields by assertions without a message.
        sizes = name_to_config.get(model_name, {}) | fields
        found = ", ".join(
            f"{name} is {sizes[name]}" for name in ("n_embd", "n_head", "n_query_groups") if name in sizes
        )
        reason = str(error) or f"n_embd must be a multiple of n_head, and n_head of n_query_groups, but {found}"
        if "not a supported config name" in reason:
            raise ValueError(_unknown_name(str(model_name))) from error
        raise ValueError(f"litgpt cannot build `model_name` {model_name!r} with `config` {config}: {reason}") from error


def build(config: Config, tie_embeddings: bool = False, checkpoint_dir: str | None = None) -> GPT:
    """Build a ``GPT``; with LoRA's fields, litgpt's ``GPT`` with LoRA, whose other weights are frozen.

    Weights of a checkpoint are mapped from the file, in its dtype, and nothing is drawn in their place;
    :func:`~lightning_adapm.litgpt.weights.place_weights` copies them to where they are trained. On the meta device no
    checkpoint is opened, so that memory can be planned before the weights are downloaded.

    Args:
        config: Configuration of the model.
        tie_embeddings: Whether the output layer shares the token embedding's weight.
        checkpoint_dir: Directory whose ``lit_model.pth`` the weights are from; None for litgpt's random weights.

    Returns:
        The model; weights that are not a checkpoint's are in torch's default dtype.

    Raises:
        FileNotFoundError: There is no ``lit_model.pth`` in the directory.
        ValueError: Its parameters have other names or shapes than the model's.
    """
    from litgpt import GPT, lora

    planned = torch.get_default_device().type == "meta"
    with parameters_without_values() if checkpoint_dir and not planned else nullcontext():
        model = lora.GPT(config) if isinstance(config, lora.Config) else GPT(config)
    if checkpoint_dir and not planned:
        attach_weights(model, checkpoint_file(checkpoint_dir, WEIGHTS), tie_embeddings)
    if tie_embeddings:
        head = getattr(model.lm_head, "linear", model.lm_head)  # with LoRA, the head holds a Linear
        head.weight = model.transformer.wte.weight
    if not checkpoint_dir and not planned:  # on the meta device, thousands of slow calls would change nothing
        model.apply(model._init_weights)
    if isinstance(config, lora.Config):
        lora.mark_only_lora_as_trainable(model)
    return model


def checkpoint_file(checkpoint_dir: str, name: str) -> Path:
    """Path of a file in a litgpt checkpoint directory.

    Raises:
        FileNotFoundError: The file or the directory does not exist.
    """
    folder = Path(checkpoint_dir).expanduser()
    path = folder / name
    if path.is_file():
        return path
    found = f"has no {name}" if folder.is_dir() else "does not exist"
    raise FileNotFoundError(
        f"`checkpoint_dir`: {str(folder)!r} {found}; give a litgpt checkpoint directory with {WEIGHTS} and"
        f" {MODEL_CONFIG}, as `litgpt download` and the callback LitGPTCheckpoint write it"
    )


def load_tokenizer(tokenizer_dir: str | None) -> Tokenizer:
    """Load a folder's tokenizer as litgpt does.

    Raises:
        ValueError: No folder is given.
        FileNotFoundError: The folder has no tokenizer.
    """
    from litgpt.tokenizer import Tokenizer

    if tokenizer_dir is None:
        raise ValueError(
            "litgpt's data modules need a tokenizer; give `model.init_args.tokenizer_dir`, a folder with tokenizer.json"
            " (or tokenizer.model) and tokenizer_config.json, or `model.init_args.checkpoint_dir`"
        )
    folder = Path(tokenizer_dir).expanduser()
    check_tokenizer(folder)
    return Tokenizer(folder)


def check_tokenizer(folder: Path) -> None:
    """Check that a folder has a tokenizer.

    Raises:
        FileNotFoundError: The folder has none.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileNotFoundError(
            f"`tokenizer_dir`: there is neither tokenizer.json nor tokenizer.model in {str(folder)!r}; give a folder"
            " with a tokenizer, such as a litgpt checkpoint directory"
        )


def check_weights(config: Config, checkpoint_dir: str) -> None:
    """Check that a checkpoint is of the model that ``config`` describes, without loading either into memory.

    Raises:
        FileNotFoundError: There is no ``lit_model.pth`` in the directory.
        ValueError: Its parameters have other names or shapes than the model's.
    """
    from litgpt import GPT

    with torch.device("meta"):
        model = GPT(config)
    matching_weights(model, checkpoint_file(checkpoint_dir, WEIGHTS), tie_embeddings=False)


def check_raw(checkpoint_dir: Path) -> None:
    """Check that a checkpoint has nothing but weights, where litgpt assumes so.

    Raises:
        ValueError: The checkpoint is a whole training state.
    """
    saved = torch.load(checkpoint_dir / WEIGHTS, map_location="cpu", mmap=True, weights_only=True)
    if "model" in saved:
        raise ValueError(
            f"{str(checkpoint_dir / WEIGHTS)!r} holds the whole state of a training, which litgpt cannot start from"
            f" here; write litgpt convert_pretrained_checkpoint {checkpoint_dir} OUT_DIR, and give that folder"
        )


def _unknown_name(model_name: str) -> str:
    from litgpt.config import name_to_config

    lower = {name.lower(): name for name in name_to_config}
    close = difflib.get_close_matches(model_name.rpartition("/")[2].lower(), lower, n=3)
    hint = f"did you mean {', '.join(lower[name] for name in close)}?" if close else "`litgpt pretrain list` lists them"
    return f"litgpt has no model_name {model_name!r}; {hint}"
