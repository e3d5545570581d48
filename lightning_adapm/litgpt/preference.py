"""Direct preference optimization (DPO) of litgpt models: the loss, the module and its data."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from lightning_adapm.litgpt.module import LitGPTModule

FIELDS = ("prompt", "chosen", "rejected")
IGNORED = -100  # label of a token that does not count, as in litgpt


class DPOModule(LitGPTModule):
    """Training of a litgpt model on pairs of answers, with the initial model as a frozen reference.

    The loss is ``-log sigmoid(beta * (policy's log-ratio - reference's log-ratio))``, equation 7 of arXiv 2305.18290. A
    log-ratio is the log-probability of the chosen answer minus that of the rejected one. The module logs
    ``train_loss``, ``val_loss``, ``train_accuracy`` and ``val_accuracy``, the share of pairs for which the policy
    prefers the chosen answer more than the reference does.

    Args:
        beta: Strength of the bond to the reference; larger is stronger.
        **kwargs: Arguments of ``LitGPTModule``, normally with ``checkpoint_dir``.

    Raises:
        ValueError: ``beta`` is not positive, or ``LitGPTModule`` refuses an argument.
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        if not beta > 0:
            raise ValueError(f"`beta` must be positive, but got {beta}")
        super().__init__(**kwargs)
        self.save_hyperparameters({"beta": beta})
        self.beta = beta
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            raise NotImplementedError("DPOModule does not run under ModelParallelStrategy yet; use one device or DDP")
        super().configure_model()

    def train(self, mode: bool = True) -> DPOModule:
        super().train(mode)
        self.reference.eval()  # with LoRA's dropout, the reference would differ in every step
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Mean loss of the batch, in nats."""
        if batch_idx == 0:
            self._warn_without_targets((batch["labels"] != IGNORED).sum())
        return self._log_pairs("train", batch)

    def validation_step(self, batch: Tensor | Mapping[str, Any], batch_idx: int) -> None:
        """Log the batch's loss and accuracy; Lightning takes the means."""
        self._log_pairs("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Do nothing, because Lightning takes the means."""

    def _log_pairs(self, part: str, batch: Any) -> Tensor:
        policy = answer_log_probs(self.model(batch["input_ids"][:, :-1]), batch["labels"][:, 1:])
        with torch.no_grad():
            reference = answer_log_probs(self.reference(batch["input_ids"][:, :-1]), batch["labels"][:, 1:])
        margins = dpo_margins(policy, reference, self.beta)
        loss = -functional.logsigmoid(margins).mean()
        figures = {f"{part}_loss": loss, f"{part}_accuracy": (margins > 0).float().mean()}
        self.log_dict(figures, prog_bar=True, batch_size=len(margins), sync_dist=part == "val")
        return loss


def answer_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of answers, float32 of shape (rows,).

    Args:
        logits: Logits of shape (rows, positions, vocabulary).
        targets: Tokens, int64 of shape (rows, positions); -100 where a token is not part of the answer.
    """
    losses = functional.cross_entropy(logits.mT.float(), targets, ignore_index=IGNORED, reduction="none")
    return -losses.sum(1)


def dpo_margins(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Margins ``beta * (policy's log-ratio - reference's log-ratio)``, of shape (pairs,).

    Args:
        policy: The policy's log-probabilities of all chosen answers, then of all rejected ones, in the same order.
        reference: The reference's log-probabilities, in the same order.
        beta: Strength of the pull towards the reference.
    """
    chosen, rejected = (policy - reference).chunk(2)
    return beta * (chosen - rejected)


class PreferenceData(L.LightningDataModule):
    """Pairs of answers from a JSON file: a list of ``{"prompt": ..., "chosen": ..., "rejected": ...}``.

    Batches are dicts of int64 ``input_ids`` and ``labels`` of shape (2 * batch, positions). All chosen answers come
    first, then all rejected ones, each after its prompt, whose labels are -100. The module provides the tokenizer and
    sizes by ``connect``.

    Args:
        json_path: File of pairs; a ``.jsonl`` file has one pair per line.
        val_split_fraction: Share of the pairs for validation, between 0 and 1, from the end of a fixed shuffle.
        prompt_style: Name of the litgpt prompt style for prompts.
        seed: Seed of the split and of the order.
        num_workers: Number of processes that load data.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An option is out of range, or the file does not hold at least two such pairs.
    """

    def __init__(
        self,
        json_path: str,
        val_split_fraction: float = 0.05,
        prompt_style: str = "alpaca",
        seed: int = 42,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < val_split_fraction < 1:
            raise ValueError(f"`val_split_fraction` must lie between 0 and 1, but got {val_split_fraction}")
        self.path = Path(json_path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"`json_path`: there is no file {json_path!r}; give a JSON file of pairs")
        self.val_split_fraction = val_split_fraction
        self.prompt_style = prompt_style
        self.seed = seed
        self.num_workers = num_workers
        self.tokenizer: Any = None
        self.batch_size, self.max_seq_length = 1, -1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Set litgpt's tokenizer, the pairs per batch, and the maximum positions of a prompt with its answer."""
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.max_seq_length = -1 if max_seq_length is None else max_seq_length

    def setup(self, stage: str | None = None) -> None:
        """Read, check, shuffle and split the pairs."""
        pairs = self._read()
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self.seed)).tolist()
        kept = len(pairs) - min(max(1, round(self.val_split_fraction * len(pairs))), len(pairs) - 1)
        self._train = [pairs[index] for index in order[:kept]]
        self._val = [pairs[index] for index in order[kept:]]

    def train_dataloader(self) -> DataLoader:
        return self._loader(self._train, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self._val, shuffle=False)

    def _loader(self, pairs: list[dict[str, str]], shuffle: bool) -> DataLoader:
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(
            pairs,  # type: ignore[arg-type]
            self.batch_size,
            shuffle=shuffle,
            generator=generator,
            num_workers=self.num_workers,
            collate_fn=self._collate,
        )

    def _collate(self, pairs: list[dict[str, str]]) -> dict[str, Tensor]:
        from litgpt.data import SFTDataset

        rows = [{"instruction": pair["prompt"], "output": pair[answer]} for answer in FIELDS[1:] for pair in pairs]
        encoded = SFTDataset(rows, self.tokenizer, self.prompt_style, self.max_seq_length, ignore_index=IGNORED)
        samples = [encoded[index] for index in range(len(rows))]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            key: pad([sample[key] for sample in samples], batch_first=True, padding_value=value)
            for key, value in (("input_ids", 0), ("labels", IGNORED))
        }

    def _read(self) -> list[dict[str, str]]:
        text = self.path.read_text(encoding="utf-8")
        try:
            if self.path.suffix == ".jsonl":
                pairs = [json.loads(line) for line in text.splitlines() if line.strip()]
            else:
                pairs = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"`json_path`: {str(self.path)!r} is not JSON ({error}); give a list of {{{', '.join(FIELDS)}}}, or one"
                " of them per line in a .jsonl file"
            ) from error
        if not isinstance(pairs, list) or len(pairs) < 2:
            raise ValueError(
                f"`json_path`: {str(self.path)!r} must hold a list of at least two pairs, but got {len(pairs)} in a"
                f" {type(pairs).__name__}"
            )
        for index, pair in enumerate(pairs):
            if not isinstance(pair, dict) or not all(isinstance(pair.get(field), str) for field in FIELDS):
                found = sorted(pair) if isinstance(pair, dict) else type(pair).__name__
                raise ValueError(
                    f"`json_path`: pair {index} of {str(self.path)!r} must have the texts {', '.join(FIELDS)}, but"
                    f" got {found}"
                )
        return pairs
