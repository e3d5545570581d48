"""Export to a litgpt checkpoint directory, for `litgpt generate`, `chat`, `evaluate` and finetuning."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import yaml
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_adapm.data.tokens import save_tokenizer
from lightning_adapm.litgpt.checks import check_writable

if TYPE_CHECKING:
    from litgpt import Config


class LitGPTCheckpoint(L.Callback):
    """Write the trained model of a ``LitGPTModule`` as a litgpt checkpoint directory when training ends.

    - ``lit_model.pth`` holds all weights in their training dtype, with LoRA's matrices merged into them.
    - ``model_config.yaml`` holds the ``litgpt.Config``, and ``hyperparameters.yaml`` the module's arguments.
    - The tokenizer is the data's. ``prompt_style.yaml`` is written where the data has a prompt style.

    Args:
        out_dir: Directory to write, such as ``"out/pretrain/final"``.

    Raises:
        MisconfigurationException: Before training, where the module is no ``LitGPTModule``, FSDP1 writes sharded
            checkpoints, or the directory cannot be written.
    """

    def __init__(self, out_dir: str) -> None:
        self.out_dir = Path(out_dir).expanduser()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        from lightning_adapm.litgpt.module import LitGPTModule

        if not isinstance(pl_module, LitGPTModule):
            raise MisconfigurationException(
                f"LitGPTCheckpoint writes models of LitGPTModule, but the model is a {type(pl_module).__name__};"
                " remove the callback, or train a LitGPTModule"
            )
        if getattr(trainer.strategy, "_state_dict_type", "full") != "full":
            raise MisconfigurationException(
                f"LitGPTCheckpoint needs all weights on one process, but {type(trainer.strategy).__name__} leaves them"
                " spread; set state_dict_type: full"
            )
        if stage == "fit" and trainer.is_global_zero:
            try:
                check_writable(self.out_dir)
            except ValueError as error:
                raise MisconfigurationException(f"LitGPTCheckpoint: {error}") from error

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        state = _whole_state(trainer.strategy)  # all processes take part
        if trainer.is_global_zero:
            write_checkpoint(self.out_dir, pl_module, state, getattr(trainer, "datamodule", None))
        trainer.strategy.barrier("LitGPTCheckpoint")


def _whole_state(strategy: Strategy) -> dict[str, Any]:
    """All weights, on the first process at least, whatever form the strategy's own checkpoints have."""
    if not isinstance(strategy, ModelParallelStrategy):
        return strategy.lightning_module_state_dict()
    assert strategy.model is not None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(strategy.model, options=options)


def write_checkpoint(out_dir: Path, module: Any, state: dict[str, Any], data: Any = None) -> None:
    """Write a litgpt checkpoint directory.

    Args:
        out_dir: Directory to write; created if necessary.
        module: Module that the configuration, the arguments and the tokenizer are from.
        state: Full state dict of the module.
        data: Data module that the tokenizer and the prompt style are from.
    """
    from litgpt.prompts import save_prompt_style
    from litgpt.utils import copy_config_files, save_config

    out_dir.mkdir(parents=True, exist_ok=True)
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    config = module.model.config
    if hasattr(config, "lora_r"):
        weights = _merged(config, weights)
    _save({key: value.detach().cpu() for key, value in weights.items()}, out_dir / "lit_model.pth")
    if module.tokenizer_dir is not None and Path(module.tokenizer_dir).expanduser().resolve() != out_dir.resolve():
        copy_config_files(Path(module.tokenizer_dir).expanduser(), out_dir)
    elif hasattr(getattr(data, "tokenizer", None), "to_str"):  # trained by TextDataModule
        save_tokenizer(data.tokenizer, out_dir)
    save_config(_without_lora(config), out_dir)  # after the copy, which may bring another model's
    if getattr(data, "prompt_style", None) is not None:
        save_prompt_style(data.prompt_style, out_dir)
    arguments = {
        "checkpoint_dir": module.hparams.get("checkpoint_dir"),
        "model": json.loads(json.dumps(dict(module.hparams), default=str)),
    }
    (out_dir / "hyperparameters.yaml").write_text(yaml.safe_dump(arguments), encoding="utf-8")


def _save(weights: dict[str, Any], path: Path) -> None:
    """Save weights under their name only when they are complete, so that a full disk loses no earlier ones."""
    partial = path.with_suffix(".partial")
    try:
        torch.save(weights, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _merged(config: Config, weights: dict[str, Any]) -> dict[str, Any]:
    """Merge LoRA's matrices, and name the weights as in the plain model."""
    from litgpt.lora import GPT, lora_filter, merge_lora_weights

    with torch.device("meta"):
        model = GPT(config)
    # Copies, because merging writes into them and the module may continue training.
    model.load_state_dict({key: value.detach().cpu().clone() for key, value in weights.items()}, assign=True)
    merge_lora_weights(model)
    return {k.replace(".linear.", "."): v for k, v in model.state_dict().items() if not lora_filter(k, v)}


def _without_lora(config: Config) -> Config:
    """Configuration of the plain model."""
    from litgpt import Config

    fields = {field.name for field in dataclasses.fields(Config)}
    return Config(**{name: value for name, value in dataclasses.asdict(config).items() if name in fields})
