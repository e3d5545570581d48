"""A LightningModule for pretraining and finetuning litgpt's ``GPT``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FSDPModule, fully_shard
from torchmetrics import MeanMetric

from lightning_adapm.litgpt.checks import check_data
from lightning_adapm.litgpt.loss import chunked_loss, summed_loss
from lightning_adapm.litgpt.model import build, litgpt_config, load_tokenizer
from lightning_adapm.litgpt.reading import Read, placed, unread
from lightning_adapm.litgpt.weights import give_shards, place_later, place_weights, take_weights
from lightning_adapm.report.tables import show_bytes
from lightning_adapm.sharding.find import has_values, local
from lightning_adapm.trainer.config import OptimizerConfig
from lightning_adapm.trainer.mixin import AdaPMMixin

__all__ = ["LitGPTModule", "batch_length", "batch_rows", "litgpt_config"]


class LitGPTModule(AdaPMMixin, L.LightningModule):
    """Next-token training of a litgpt ``GPT``, from random weights or from a litgpt checkpoint directory.

    The module logs ``train_loss`` of each batch, ``val_loss``, the mean cross-entropy in nats per target token, and
    ``val_ppl``, its exponential. ``TextDataModule`` and litgpt's pretraining data give batches that are integer tensors
    of shape (batch, positions + 1). litgpt's finetuning data gives dicts with int64 ``input_ids`` and ``labels`` of
    shape (batch, positions), where labels equal to the data's ``ignore_index`` (-100) do not count.

    litgpt's data modules expect a tokenizer, a batch size and a sequence length from the training loop. The module
    passes them on before any data is prepared.

    Args:
        model_name: One of litgpt's names, such as ``"pythia-14m"``.
        config: Fields of ``litgpt.Config``, for the whole model or to change ``model_name``'s. With ``lora_r`` and
            other fields of ``litgpt.lora.Config``, only LoRA's matrices are trained.
        tie_embeddings: Whether the output layer shares the token embedding's weight.
        adapm: Settings of optimizer and schedule, see ``AdaPMMixin``; ``None`` for the defaults.
        checkpoint_dir: litgpt checkpoint directory. Its ``lit_model.pth`` holds the initial weights, which stay in the
            file until ``configure_model`` copies them to their device and dtype. Its ``model_config.yaml`` describes
            the model if neither ``model_name`` nor ``config`` is given.
        tokenizer_dir: Folder of the tokenizer for litgpt's data modules; ``None`` for ``checkpoint_dir``.
        micro_batch_size: Sequences per batch on each process, for litgpt's data modules.
        max_seq_length: Positions per sequence, for litgpt's data modules; ``None`` for the model's ``block_size``.
        lm_head_chunk_size: Number of positions whose logits are computed together, and again in the backward pass, to
            save memory; 0 for all. Models that cap their logits compute them once and keep them.
        activation_checkpointing: Whether each block's activations are computed again in the backward pass, to save
            memory.
        torch_compile: Whether the model is compiled with ``torch.compile``.

    Raises:
        ModuleNotFoundError: litgpt is not installed.
        ValueError: litgpt has no such name or field, the fields do not fit together, the checkpoint is of another
            model, or an option of ``adapm`` does not exist or is out of range.
        FileNotFoundError: A file of the checkpoint directory is missing.
    """

    def __init__(
        self,
        model_name: str | None = None,
        config: dict[str, Any] | None = None,
        tie_embeddings: bool = False,
        adapm: dict[str, Any] | None = None,
        checkpoint_dir: str | None = None,
        tokenizer_dir: str | None = None,
        micro_batch_size: int = 1,
        max_seq_length: int | None = None,
        lm_head_chunk_size: int = 0,
        activation_checkpointing: bool = False,
        torch_compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.adapm = adapm or {}
        OptimizerConfig.resolve(self.adapm)  # before data is prepared, which may take hours
        for name, value, least in (
            ("micro_batch_size", micro_batch_size, 1),
            ("max_seq_length", max_seq_length, 1),
            ("lm_head_chunk_size", lm_head_chunk_size, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, but got {value}")
        self.tokenizer_dir = tokenizer_dir or checkpoint_dir
        self.micro_batch_size = micro_batch_size
        self.max_seq_length = max_seq_length
        self.lm_head_chunk_size = lm_head_chunk_size
        self.torch_compile = torch_compile
        # Not in `configure_model`, because LightningCLI builds the optimizer before there is a Trainer.
        self.model = build(litgpt_config(model_name, config, checkpoint_dir), tie_embeddings, checkpoint_dir)
        self._in_file = checkpoint_dir is not None
        if activation_checkpointing:
            blocks = set(self.model.transformer.h)
            apply_activation_checkpointing(self.model, check_fn=lambda module: module in blocks)
        from litgpt.utils import estimate_flops

        # Before a strategy shards the parameters. Exact for full windows, a little high for shorter ones.
        self._flops_per_token = estimate_flops(self.model, training=True) / self.model.config.block_size
        self.flops_per_batch = 0
        self._val_loss = MeanMetric()

    def configure_callbacks(self) -> list[L.Callback]:
        """Connect litgpt's data. No callbacks are added, but no other hook runs before the data is prepared.

        Raises:
            MisconfigurationException: ``max_seq_length`` is longer than the model's ``block_size``.
        """
        data: Any = getattr(self._trainer, "datamodule", None)
        if hasattr(data, "connect"):
            check_data(data)
            length = self.max_seq_length or self.model.config.block_size
            if length > self.model.config.block_size:
                raise MisconfigurationException(
                    f"`max_seq_length` is {length}, more than the model's `block_size` of"
                    f" {self.model.config.block_size}; lower `model.init_args.max_seq_length`"
                )
            # tokenized data needs no tokenizer
            tokenizer = load_tokenizer(self.tokenizer_dir) if hasattr(data, "tokenizer") else None
            data.connect(tokenizer, self.micro_batch_size, length)
        return []

    def configure_model(self) -> None:
        """Copy a checkpoint's weights to their device and dtype; under FSDP2, shard every block and then the rest.

        The model is compiled if asked for. Outside a Trainer, the copies are made by torch's default device and dtype.

        Raises:
            MisconfigurationException: The strategy has more than one process for tensor parallelism.
        """
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            shared = self.device_mesh["tensor_parallel"].size()
            if shared > 1:
                raise MisconfigurationException(
                    f"LitGPTModule does not support tensor parallelism, but the strategy has `tensor_parallel_size`"
                    f" {shared}; those processes would do the same work; write"
                    f" `ModelParallelStrategy(data_parallel_size={self.device_mesh.size()}, tensor_parallel_size=1)`"
                )
            began = time.perf_counter()
            weights = take_weights(self.model, torch.get_default_dtype())
            for part in (*self.model.transformer.h, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            give_shards(self.model, weights, self._read)
            self._say_placed(began)
            self._in_file = False
        self._leave_file()
        if self.torch_compile and self.model._compiled_call_impl is None:
            self.model.compile()  # in place, so that names stay as they are

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights, in the dtype that training has, and not in that of the checkpoint directory's file."""
        self._leave_file()
        return super().load_state_dict(state_dict, strict, assign)

    def _leave_file(self) -> None:
        """Copy weights that are still mapped from the checkpoint's file, if any; under FSDP1, as it flattens them."""
        if self._in_file:
            strategy, dtype = self._trainer and self._trainer.strategy, torch.get_default_dtype()
            if isinstance(strategy, FSDPStrategy) and "param_init_fn" not in strategy.kwargs:
                strategy.kwargs["param_init_fn"] = place_later(self, strategy.root_device, dtype, self._read)
            else:
                began = time.perf_counter()
                place_weights(self, torch.get_default_device(), dtype, self._read)
                self._say_placed(began)
        self._in_file = False

    @property
    def _read(self) -> Read:
        return unread if self.resumes and self.strict_loading else placed

    def _say_placed(self, began: float) -> None:
        """Say how long it took to copy the weights of this process from the file, if they were: a plan has none."""
        if self._in_file and self._read is placed and all(map(has_values, self.parameters())):
            held = sum(local(param).nbytes for param in self.parameters())
            rank_zero_info(f"weights: {show_bytes(held)} in {time.perf_counter() - began:.1f} s")

    def setup(self, stage: str) -> None:
        """Check that the data's vocabulary and windows fit into the model.

        Raises:
            MisconfigurationException: They do not.
        """
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
                    f"The data's `{option}` is {found}, more than the model's `{field}` of {limit}; set"
                    f" `model.init_args.config.{option}` to at least {found}, or lower `data.init_args.{option}`"
                )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, positions, padded vocabulary) for int64 tokens of shape (batch, positions)."""
        return self.model(tokens)

    def training_step(self, batch: Tensor | Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, in nats per target token."""
        loss, targets = self._loss(batch)
        if batch_idx == 0:
            self._warn_without_targets(targets)
        self.flops_per_batch = round(self._flops_per_token * batch_rows(batch) * batch_length(batch))
        self.log("train_loss", loss, prog_bar=True, batch_size=batch_rows(batch))
        return loss

    def _warn_without_targets(self, targets: Tensor) -> None:
        """Warn where a batch has no target, which waits for the device: for the first batch alone."""
        if not targets:
            rank_zero_warn(
                f"The first batch has no token to predict: all its labels are {self._ignored}, so nothing is learned"
                " from it. Where `max_seq_length` cuts off whole answers, raise `model.init_args.max_seq_length`"
                f" (found: {self.max_seq_length}), or drop such rows from the data"
            )

    def validation_step(self, batch: Tensor | Mapping[str, Any], batch_idx: int) -> None:
        """Add the batch's cross-entropy to the validation mean over all target tokens."""
        loss, targets = self._loss(batch)
        if targets:
            self._val_loss.update(loss, weight=targets)

    def on_validation_epoch_start(self) -> None:
        """Start a new mean. `fit` cannot continue with tensors that `validate` made in inference mode."""
        self._val_loss.reset()

    def on_validation_epoch_end(self) -> None:
        """Log the mean over all processes, and its exponential."""
        loss = self._val_loss.compute()
        self.log_dict({"val_loss": loss, "val_ppl": loss.exp()}, prog_bar=True, sync_dist=True)

    @property
    def _ignored(self) -> int:
        return getattr(getattr(self._trainer, "datamodule", None), "ignore_index", -100)

    def _loss(self, batch: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the target tokens, and their number; both are 0 where all are masked."""
        inputs, targets = _shifted(batch)
        ignored, size = self._ignored, self.lm_head_chunk_size
        if not size:
            total = summed_loss(self(inputs), targets, ignored)
        elif self.model.config.final_logit_softcapping is not None:  # which litgpt applies to what the head returns
            logits = self.model(inputs, lm_head_chunk_size=size)
            total = torch.stack(list(map(summed_loss, logits, targets.split(size, dim=1), repeat(ignored)))).sum()
        else:
            with _without_head(self.model):
                hidden = self.model(inputs)
            total = chunked_loss(self.model.lm_head, hidden, targets, ignored, size)
        count = (targets != ignored).sum()
        return total / count.clamp(min=1), count


@contextmanager
def _without_head(model: torch.nn.Module) -> Iterator[None]:
    """Within the context, a ``GPT`` returns what its output layer would get; the layer itself stays as it is."""
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    try:
        yield
    finally:
        model.lm_head = head


def batch_rows(batch: Tensor | Mapping[str, Any]) -> int:
    """Number of sequences in a batch, as ``batch_size_fn`` of Lightning's ``ThroughputMonitor``."""
    return _shifted(batch)[0].size(0)


def batch_length(batch: Tensor | Mapping[str, Any]) -> int:
    """Positions per sequence that the model sees, as ``length_fn`` of Lightning's ``ThroughputMonitor``."""
    return _shifted(batch)[0].size(1)


def _shifted(batch: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Inputs, and the tokens to predict from them."""
    if isinstance(batch, Tensor):
        batch = batch.long()  # litdata keeps the tokenizer's int32
        return batch[:, :-1], batch[:, 1:]
    return batch["input_ids"][:, :-1], batch["labels"][:, 1:]
