"""Direct preference optimisation (DPO) of litgpt models: the loss, the module and its data."""

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
IGNORED = -100  # a label that does not count, as in litgpt


class DPOModule(LitGPTModule):
    """Trains a litgpt model on pairs of answers, with the model it starts from as a frozen reference.

    The loss is ``-log sigmoid(beta * (policy's log-ratio - reference's log-ratio))`` of arXiv 2305.18290, equation 7,
    where a log-ratio is the log-probability of the chosen answer less that of the rejected one. Logs ``train_loss`` and
    ``train_accuracy`` (the share of pairs that the policy moved the right way), and both as ``val_``.

    Args:
        beta: How strongly the policy is held to the reference; larger is stronger.
        **kwargs: As for ``LitGPTModule``; normally with ``checkpoint_dir``.

    Raises:
        ValueError: If ``beta`` is not positive, and as ``LitGPTModule``.
    """

    def __init__(self, beta: float = 0.1, **kwargs: Any) -> None:
        if not beta > 0:
            raise ValueError(f"`beta` must be positive, found {beta}.")
        super().__init__(**kwargs)
        self.save_hyperparameters({"beta": beta})
        self.beta = beta
        self.reference = copy.deepcopy(self.model).requires_grad_(False)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            raise NotImplementedError("DPOModule does not run under ModelParallelStrategy yet; use one device or DDP.")
        super().configure_model()

    def train(self, mode: bool = True) -> DPOModule:
        super().train(mode)
        self.reference.eval()  # its dropout, of LoRA, would make the reference another one in every step
        return self

    def training_step(self, batch: Tensor | Mapping[str, Any], batch_idx: int) -> Tensor:
        """The batch's mean loss, in nats."""
        return self._log_pairs("train", batch)

    def validation_step(self, batch: Tensor | Mapping[str, Any], batch_idx: int) -> None:
        """Log the batch's share in the validation means."""
        self._log_pairs("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Lightning itself takes the means."""

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
        logits: Of shape (rows, positions, vocabulary).
        targets: int64 of shape (rows, positions); -100 where a token is not part of the answer.
    """
    losses = functional.cross_entropy(logits.mT.float(), targets, ignore_index=IGNORED, reduction="none")
    return -losses.sum(1)


def dpo_margins(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """``beta`` times what the policy's log-ratio exceeds the reference's, of shape (pairs,).

    Args:
        policy: Log-probabilities of all chosen answers, then of all rejected ones, in the same order.
        reference: The same by the reference.
        beta: The strength of the bond to the reference.
    """
    chosen, rejected = (policy - reference).chunk(2)
    return beta * (chosen - rejected)


class PreferenceData(L.LightningDataModule):
    """Pairs of answers from a JSON file: a list of ``{"prompt": ..., "chosen": ..., "rejected": ...}``.

    Batches are dicts of int64 ``input_ids`` and ``labels``, of shape (2 * batch, positions): all chosen answers, then
    the rejected ones, each after its prompt, whose labels are -100. The module ``connect``s tokenizer and sizes.

    Args:
        json_path: The file; ``.jsonl`` has one pair a line.
        val_split_fraction: The share of pairs that validates, between 0 and 1; the last ones of a fixed shuffle.
        prompt_style: One of litgpt's prompt styles, applied to the prompt.
        seed: Chooses the split and the order.
        num_workers: Processes that load.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an option is out of range, or the file is not made of at least two such pairs.
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
            raise ValueError(f"`val_split_fraction` must lie between 0 and 1, found {val_split_fraction}.")
        self.path = Path(json_path).expanduser()
        if not self.path.is_file():
            raise FileNotFoundError(f"`json_path`: there is no file {json_path!r}. Give a JSON file of pairs.")
        self.val_split_fraction = val_split_fraction
        self.prompt_style = prompt_style
        self.seed = seed
        self.num_workers = num_workers
        self.tokenizer: Any = None
        self.batch_size, self.max_seq_length = 1, -1

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Take litgpt's tokenizer, the pairs per batch, and the most positions of a prompt with its answer."""
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
        if self.path.suffix == ".jsonl":
            pairs = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            pairs = json.loads(text)
        if not isinstance(pairs, list) or len(pairs) < 2:
            raise ValueError(f"`json_path`: {str(self.path)!r} must hold a list of at least two pairs.")
        for index, pair in enumerate(pairs):
            if not isinstance(pair, dict) or not all(isinstance(pair.get(field), str) for field in FIELDS):
                found = sorted(pair) if isinstance(pair, dict) else type(pair).__name__
                raise ValueError(
                    f"`json_path`: pair {index} of {str(self.path)!r} must have the texts {', '.join(FIELDS)}, but it"
                    f" has {found}."
                )
        return pairs
