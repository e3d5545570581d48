"""Preference tuning by DPO, each optimizer at its own rates: ``python -m benchmarks.preference_training``.

``DPOModule`` and ``PreferenceData`` run as in ``recipes/trainer/preference``. The weights are those that the study
``finetune_at_size`` pretrained, converted for litgpt and finetuned on the chosen answers. A rejected answer is the
chosen one with one other number, so that the model has to look at the question and at the sums: with other numbers
throughout, every pair held out was told apart.
"""

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.pages.page import RESULTS, provenance, session, table, write
from benchmarks.studies import finetuning
from benchmarks.studies.decoder import Shape
from benchmarks.studies.optimizers import Parameters, build, resolve
from benchmarks.studies.text import read_bytes
from benchmarks.studies.training import schedule
from lightning_adapm.data.tokens import import_tokenizers, save_tokenizer
from lightning_adapm.litgpt.module import LitGPTModule
from lightning_adapm.litgpt.preference import DPOModule, PreferenceData

LABELS = "AdamW", "AdaPM", "AdaPM factored", "PartialMuon", "Adam-mini"
ROWS = {label: finetuning.ROWS[label] for label in LABELS}
LRS = (3e-5, 1e-4, 1e-5)
RATES = {"PartialMuon": (1e-4, 3e-4, 3e-5)}
FINETUNING = ("AdamW", 3e-4)
"""Optimizer and learning rate of the finetuning on the chosen answers."""
NAMES = {
    "wte.": "transformer.wte.",
    "blocks.": "transformer.h.",
    "mlp.gate.": "mlp.fc_1.",
    "mlp.up.": "mlp.fc_2.",
    "mlp.down.": "mlp.proj.",
}
"""Beginnings and middles of names in a Llama-like decoder here, and in litgpt."""


@dataclass(frozen=True)
class Row:
    """An optimizer at a learning rate."""

    label: str
    lr: float

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Optimizer of a litgpt model, without weight decay as in the recipe."""
        config = cast(Any, model).config
        heads = {"n_head": config.n_head, "n_query_groups": config.n_query_groups}
        kind, options = ROWS[self.label]
        resolved = resolve(kind, options) | {"weight_decay": 0.0}
        return build(resolved, Parameters(list(model.named_parameters()), heads), self.lr)


class _WithRow:
    """A module's optimizer is a row's, with warm-up and cosine to a tenth."""

    row: Row

    def configure_optimizers(self) -> Any:
        module = cast(LitGPTModule, self)
        optimizer = self.row.build(module.model)
        steps = int(module.trainer.estimated_stepping_batches)
        rates = LambdaLR(optimizer, partial(schedule, steps=steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


class Finetuned(_WithRow, LitGPTModule):
    """Finetuning on the chosen answers."""


class Aligned(_WithRow, DPOModule):
    """Preference tuning."""


class ChosenAnswers(PreferenceData):
    """The chosen answers alone, for finetuning, split as the pairs are."""

    def _collate(self, pairs: list[dict[str, str]]) -> dict[str, Tensor]:
        return {key: value[: len(pairs)] for key, value in super()._collate(pairs).items()}


def litgpt_config(shape: Shape) -> dict[str, Any]:
    """Fields of ``litgpt.Config`` for a Llama-like decoder."""
    return {
        "n_layer": shape.layers,
        "n_embd": shape.width,
        "n_head": shape.n_head,
        "n_query_groups": shape.n_query_groups or shape.n_head,
        "intermediate_size": shape.hidden,
        "mlp_class_name": "LLaMAMLP",
        "norm_class_name": "RMSNorm",
        "bias": False,
        "parallel_residual": False,
        "rotary_percentage": 1.0,
        "vocab_size": shape.vocab,
        "padded_vocab_size": shape.vocab,
        "block_size": shape.context,
    }


def litgpt_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Llama-like decoder by litgpt's names."""
    found = {}
    for name, weight in weights.items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        found["transformer.ln_f.weight" if name == "norm.weight" else name] = weight
    return found


def write_checkpoint(folder: Path, shape: Shape, weights: Mapping[str, Tensor], vocabulary: Path) -> None:
    """Write a litgpt checkpoint directory with weights and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(litgpt_config(shape)))
    torch.save(dict(weights), folder / "lit_model.pth")
    save_tokenizer(import_tokenizers().Tokenizer.from_file(str(vocabulary)), folder)


def pairs_of(path: Path, number: int) -> list[dict[str, str]]:
    """Pairs from the first lines of a ``.jsonl`` file with questions and answers that have numbers."""
    draw, pairs = random.Random(0), []
    for line in read_bytes(path).splitlines()[:number]:
        record = json.loads(line)
        answer = record["answer"]
        if numbers := list(re.finditer(r"\d+", answer)):
            changed = draw.choice(numbers)
            other = f"{answer[: changed.start()]}{int(changed[0]) + draw.randint(1, 9)}{answer[changed.end() :]}"
            pairs.append({"prompt": record["question"], "chosen": answer, "rejected": other})
    return pairs


def fit(module: LitGPTModule, data: L.LightningDataModule, device: str) -> L.Trainer:
    """Train for one epoch, with the recipe's precision and clipping on a GPU."""
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        precision="bf16-mixed" if device == "cuda" else "32-true",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, datamodule=data)
    return trainer


def finetuned(checkpoint: Path, pairs: Path, shape: Shape, args: argparse.Namespace) -> None:
    """Replace a checkpoint's weights by those finetuned on the chosen answers."""
    L.seed_everything(0)
    module = Finetuned(checkpoint_dir=str(checkpoint), micro_batch_size=args.batch, max_seq_length=shape.context)
    module.row = Row(*FINETUNING)
    trainer = fit(module, ChosenAnswers(str(pairs)), args.device)
    loss = float(trainer.callback_metrics["val_loss"])
    print(f"Finetuned on the chosen answers: {loss:.4f} nats per token", flush=True)
    weights = {name: weight.detach().cpu() for name, weight in module.model.state_dict().items()}
    torch.save(weights, checkpoint / "lit_model.pth")


def aligned(row: Row, checkpoint: Path, pairs: Path, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Loss and accuracy of a row on the pairs held out."""
    L.seed_everything(0)
    began = time.time()
    module = Aligned(checkpoint_dir=str(checkpoint), micro_batch_size=args.batch, max_seq_length=shape.context)
    module.row = row
    metrics = fit(module, PreferenceData(str(pairs)), args.device).callback_metrics
    figures = {name: round(float(metrics[f"val_{name}"]), 5) for name in ("loss", "accuracy")}
    return {"lr": row.lr, **figures, "seconds": round(time.time() - began, 1)}


def page(result: Mapping[str, Any]) -> str:
    """The table of all rows and rates."""
    rows = [
        [label, f"{run['lr']:g}", f"{run['accuracy']:.1%}", f"{run['loss']:.4f}", f"{run['seconds']:.1f}"]
        for label, runs in result["rows"].items()
        for run in runs
    ]
    words = (
        f"DPO on {result['pairs']} pairs that differ in one number, the last twentieth of a fixed shuffle held out: one"
        f" epoch in batches of {result['batch']}, beta 0.1, no weight decay, seed 0. {result['model']}. An accuracy is"
        " the share of pairs held out for which the policy prefers the chosen answer more than the reference does. Both"
        " rounds of training are the package's modules in a Trainer."
    )
    head = ["", "lr", "accuracy", "loss", "seconds"]
    return "\n".join(["# preference_training", "", provenance(result), "", words, "", *table(head, rows), ""])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference_training", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="weights/*.pt of finetune_at_size's --output")
    parser.add_argument("--vocabulary", type=Path, required=True, help="the .json beside the text of --pretrain-on")
    parser.add_argument("--data", type=Path, required=True, help=".jsonl of questions and answers, plain or .xz")
    parser.add_argument("--pairs", type=int, default=3000, help="lines of the data to use")
    parser.add_argument("--batch", type=int, default=16, help="pairs in a batch")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="seconds after which no row begins")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def main(shape: Shape = finetuning.SHAPE) -> None:
    args = parse()
    deadline = time.time() + args.time_limit
    pairs = pairs_of(args.data, args.pairs)
    result = session("preference_training", args.device) | {
        "model": str(shape),
        "pairs": len(pairs),
        "batch": args.batch,
        "rows": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, file = Path(folder) / "checkpoint", Path(folder) / "pairs.json"
        file.write_text(json.dumps(pairs))
        trained = torch.load(args.weights, map_location="cpu", weights_only=True)
        weights = {name: weight.clone() for name, weight in trained.items()}  # they share one storage
        write_checkpoint(checkpoint, shape, litgpt_weights(weights), args.vocabulary)
        finetuned(checkpoint, file, shape, args)
        for index in range(3):
            for label in ROWS:
                row = Row(label, RATES.get(label, LRS)[index])
                if time.time() > deadline:
                    print("Out of time.")
                    return
                run = aligned(row, checkpoint, file, shape, args)
                print(label, run, flush=True)
                result["rows"].setdefault(label, []).append(run)
                write(args.output / "preference_training.json", result, page(result))


if __name__ == "__main__":
    main()
