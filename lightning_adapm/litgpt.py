"""A LightningModule that pretrains litgpt's ``GPT``."""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics import MeanMetric

from lightning_adapm.mixin import AdaPMMixin, without_text_none

if TYPE_CHECKING:
    from litgpt import GPT, Config


class LitGPTModule(AdaPMMixin, L.LightningModule):
    """Next-token pretraining of a litgpt ``GPT``, from its own random initialisation.

    Logs ``train_loss`` (of the batch), ``val_loss`` (mean cross-entropy in nats per token) and ``val_ppl``, its
    exponential. A batch is an int64 tensor of shape (batch, block + 1), as ``TextDataModule`` makes them.

    Args:
        model_name: One of litgpt's names, such as ``"pythia-14m"``.
        config: Fields of ``litgpt.Config``: the whole model, or with ``model_name`` what differs from it.
        tie_embeddings: Let the output layer share the token embedding's weight.
        adapm: Settings of optimizer and schedule, see ``AdaPMMixin``; ``None`` for the defaults.

    Raises:
        ModuleNotFoundError: If litgpt is not installed.
        ValueError: If litgpt does not know the name or a field, or the fields do not fit together.
    """

    def __init__(
        self,
        model_name: str | None = None,
        config: dict[str, Any] | None = None,
        tie_embeddings: bool = False,
        adapm: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.adapm = adapm or {}
        # Not in `configure_model`: LightningCLI builds an optimizer over the parameters before there is a Trainer.
        self.model = _build(litgpt_config(model_name, config), tie_embeddings)
        self._val_loss = MeanMetric()

    def configure_model(self) -> None:
        """Shard every block, then the rest, where the strategy leaves that to the module (FSDP2)."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        for part in (*self.model.transformer.h, self.model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Check that the data's vocabulary and windows fit into the model."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        config = self.model.config
        for option, limit, field in (
            ("vocab_size", config.padded_vocab_size, "padded_vocab_size"),
            ("block_size", config.block_size, "block_size"),
        ):
            found = getattr(data, option, None)
            if isinstance(found, int) and found > limit:
                raise MisconfigurationException(
                    f"The data's `{option}` is {found}, more than the model's `{field}` of {limit}. Set"
                    f" `model.init_args.config.{option}` to at least {found}, or lower `data.init_args.{option}`."
                )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, positions, padded vocabulary) for int64 tokens of shape (batch, positions)."""
        return self.model(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The batch's mean cross-entropy, in nats per token."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add the batch's cross-entropy to the validation mean."""
        self._val_loss.update(self._loss(batch), weight=len(batch))

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all processes, and its exponential."""
        loss = self._val_loss.compute()
        self._val_loss.reset()
        self.log_dict({"val_loss": loss, "val_ppl": loss.exp()}, prog_bar=True, sync_dist=True)

    def _loss(self, batch: Tensor) -> Tensor:
        logits = self(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def litgpt_config(model_name: str | None, config: dict[str, Any] | None) -> Config:
    """The ``litgpt.Config`` that a name, a dict of its fields, or both describe.

    Raises:
        ModuleNotFoundError: If litgpt is not installed.
        ValueError: If litgpt does not know the name or a field, or the fields do not fit together.
    """
    try:
        from litgpt import Config
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LitGPTModule needs litgpt: pip install 'lightning-adapm[litgpt]'") from error
    if model_name is None and not config:
        raise ValueError(
            "LitGPTModule needs `model_name` (such as 'pythia-14m'), `config` (fields of litgpt.Config) or both."
        )
    known = [field.name for field in dataclasses.fields(Config)]
    for name in config or {}:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f". Its fields: {', '.join(known)}."
            raise ValueError(f"`config`: litgpt.Config has no field {name!r}{hint}")
    config = without_text_none(config or {})
    try:
        return Config(**config) if model_name is None else Config.from_name(model_name, **config)
    except (AssertionError, TypeError, ValueError) as error:
        # litgpt checks some fields by bare assertions, which say nothing.
        reason = str(error) or "n_embd must be a multiple of n_head, and n_head of n_query_groups"
        if "not a supported config name" in reason:
            raise ValueError(_unknown_name(str(model_name))) from error
        raise ValueError(f"litgpt cannot build `model_name` {model_name!r} with `config` {config}: {reason}") from error


def _unknown_name(model_name: str) -> str:
    from litgpt.config import name_to_config

    lower = {name.lower(): name for name in name_to_config}
    close = difflib.get_close_matches(model_name.rpartition("/")[2].lower(), lower, n=3)
    hint = f"did you mean {', '.join(lower[name] for name in close)}?" if close else "`litgpt pretrain list` lists them"
    return f"litgpt has no model_name {model_name!r}; {hint}"


def _build(config: Config, tie_embeddings: bool) -> GPT:
    from litgpt import GPT

    model = GPT(config)
    if not model.lm_head.weight.is_meta:  # there, thousands of slow calls that change nothing
        model.apply(model._init_weights)
    if tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    return model
