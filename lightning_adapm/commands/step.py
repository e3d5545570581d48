"""Memory of a training step, and the loop that a recipe trains with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_adapm.litgpt.module import LitGPTModule
from lightning_adapm.optim import RoleOptimizer
from lightning_adapm.optim.in_backward import Waiting
from lightning_adapm.optim.options import options_of
from lightning_adapm.report.memory import StepBytes, step_bytes
from lightning_adapm.report.plan import plan
from lightning_adapm.report.tables import as_text, show_bytes, step_table
from lightning_adapm.step.transients import step_transients

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True)
class Loop:
    """Training loop of a recipe on one device.

    Args:
        rows: Sequences of a micro-batch.
        length: Positions per sequence.
        accumulation: Micro-batches of an optimizer step.
        in_backward: Whether parameters move, and their gradients are freed, inside the backward pass.
        autocast: Dtype of products under mixed precision; None for that of the weights.
        litgpt: Whether litgpt's own loop trains, which computes all logits at once.
    """

    rows: int
    length: int
    accumulation: int = 1
    in_backward: bool = False
    autocast: torch.dtype | None = None
    litgpt: bool = False

    def __str__(self) -> str:
        return f"{self.rows} x {self.length} tokens" + (", updates in backward" if self.in_backward else "")

    @classmethod
    def of(cls, recipe: Mapping[str, Any], module: LitGPTModule, options: Mapping[str, Any]) -> Loop:
        """Read from a recipe, and from its module, how it trains with an optimizer of these options."""
        longest = module.model.config.block_size
        trainer, train = recipe.get("trainer"), recipe.get("train")
        if not isinstance(trainer, Mapping) and isinstance(train, Mapping):
            rows = train.get("micro_batch_size") or 1
            together = max(1, (train.get("global_batch_size") or rows) // rows)
            length = min(train.get("max_seq_length") or longest, longest)
            return cls(rows, length, together, autocast=_MIXED.get(str(recipe.get("precision"))), litgpt=True)
        trainer = trainer if isinstance(trainer, Mapping) else {}
        data = (recipe.get("data") or {}).get("init_args") or {}  # of TextDataModule, which has its own sizes
        together = trainer.get("accumulate_grad_batches") or 1
        return cls(
            data.get("batch_size") or module.micro_batch_size,
            min(data.get("block_size") or module.max_seq_length or longest, longest),
            together,
            bool(options.get("update_in_backward")) and together == 1,
            _MIXED.get(str(trainer.get("precision"))),
        )

    def loss(self, module: LitGPTModule) -> Tensor:
        """Loss of a micro-batch of tokens without values."""
        tokens = torch.empty(self.rows, self.length + 1, dtype=torch.int64, device="meta")
        if not self.litgpt:
            return module._loss(tokens)[0]
        from litgpt.utils import chunked_cross_entropy

        return chunked_cross_entropy(module.model(tokens[:, :-1]), tokens[:, 1:])

    def step(self, module: LitGPTModule, optimizer: RoleOptimizer, state: int) -> StepBytes | None:
        """Memory of a step with ``state`` bytes of optimizer state; None where the work depends on the tokens."""
        if module.model.config.n_expert:
            return None
        parts = chain.from_iterable(optimizer.parts(param) for param in optimizer.pieces if param.requires_grad)
        return step_bytes(
            module,
            lambda: self.loss(module),
            state,
            step_transients(parts, self.in_backward),
            Waiting(optimizer.param_groups, optimizer.blocks) if self.in_backward else None,
            accumulating=self.accumulation > 1,
            freed_late=not self.litgpt and not self.in_backward,
            autocast=self.autocast,
            blocks=module.model.transformer.h if module.model.config.sliding_window_indices is None else None,
        )


def at_rest(module: nn.Module, state: int) -> StepBytes:
    """Weights, gradients and optimizer state of any module, without what a step needs on top."""
    weights, gradients = (
        sum(value.numel() * value.element_size() for value in values)
        for values in (
            (*module.parameters(), *module.buffers()),
            (param for param in module.parameters() if param.requires_grad),
        )
    )
    return StepBytes(weights, gradients, state)


def print_step(
    model: nn.Module,
    recipe: Mapping[str, Any],
    make: type[RoleOptimizer],
    options: Mapping[str, Any],
    state: int,
    limit: int,
) -> bool:
    """Print the memory of a training step, and return whether it fits into ``limit`` bytes; if not, what would."""
    step, loop, about = None, None, "are planned for LitGPTModule alone"
    if type(model) is LitGPTModule:
        loop = Loop.of(recipe, model, options)
        optimizer = make(model.named_parameters(), **options)
        step, about = loop.step(model, optimizer, state), "of a mixture of experts depend on the tokens"
    if step is None:
        step = at_rest(model, state)
        print(f"Weights, gradients and state of a training step; activations {about}")
    else:
        print(f"A training step at its peak, as planned: {loop}")
    print(as_text(step_table(step)))
    left = limit - step.total
    verdict = f"fits, {show_bytes(left)} are left" if left >= 0 else f"does not fit, {show_bytes(-left)} are missing"
    print(f"{show_bytes(limit)}: {verdict}")
    if left < 0 and type(model) is LitGPTModule and loop is not None and step.weights <= limit:
        print(_instead(model, first_fitting(model, loop, make, options, limit)))
    return left >= 0


def _instead(module: LitGPTModule, found: tuple[str, str, str] | None) -> str:
    """Say which change makes a step fit, by :func:`first_fitting`, or what else saves memory."""
    if found is not None:
        step, changes, planned = found
        return f"It fits with {changes}: {planned} for {step}"
    settings = {"activation_checkpointing": True, "lm_head_chunk_size": 128}
    words = [f"{name}: {json.dumps(value)}" for name, value in settings.items() if not module.hparams[name]]
    return (
        "Smaller micro-batches, second_moment=factored, state_dtype=int8 and update_in_backward are not enough; write"
        f" {', '.join([*words, 'a lower max_seq_length'])} in model.init_args"
    )


_FACTORED, _INT8 = {"second_moment": "factored"}, {"state_dtype": "int8"}
_CHANGES: tuple[Mapping[str, Any], ...] = (
    {},
    {"rows": 1},
    _FACTORED,
    _FACTORED | {"rows": 1},
    _FACTORED | _INT8,
    _FACTORED | _INT8 | {"rows": 1},
    {"in_backward": True},
    {"in_backward": True} | _FACTORED,
    {"in_backward": True} | _FACTORED | _INT8,
    {"in_backward": True} | _FACTORED | _INT8 | {"rows": 1},
)
"""Changes that save memory, the simplest first: options of the optimizer, and fields of a :class:`Loop`. More smaller
micro-batches make up the same step, but where parameters move in backward.
"""


def first_fitting(
    module: LitGPTModule, loop: Loop, make: type[RoleOptimizer], options: Mapping[str, Any], limit: int
) -> tuple[str, str, str] | None:
    """The step, the simplest change of options with which it fits into ``limit`` bytes, and its bytes."""
    optimizer = make(module.named_parameters(), **options)
    steps: dict[Loop, StepBytes | None] = {}
    for change in _CHANGES:
        new = _changed(loop, change)
        if new is None:
            continue
        storage = {key: value for key, value in change.items() if key in options_of(make)}
        state = sum(row.bytes.total for row in plan(optimizer, storage))
        held = at_rest(module, state)
        if held.total - (held.gradients if new.in_backward else 0) > limit:
            continue
        if new not in steps:
            steps[new] = new.step(module, optimizer, 0)
        step = steps[new]
        if step is None:
            return None
        if step.total + state <= limit:
            words = [f"{key}={value}" for key, value in storage.items() if options.get(key) != value]
            return str(new), ", ".join(_words(loop, new) + words), show_bytes(step.total + state)
    return None


def _words(loop: Loop, new: Loop) -> list[str]:
    """Name the fields of a new loop that differ."""
    found = ["update_in_backward"] if new.in_backward and not loop.in_backward else []
    return found + ([f"micro-batches of {new.rows}"] if new.rows != loop.rows else [])


def _changed(loop: Loop, change: Mapping[str, Any]) -> Loop | None:
    """The loop with one of the changes; None where it does not apply."""
    if change.get("in_backward") and loop.litgpt:
        return None
    rows, in_backward = change.get("rows", loop.rows), change.get("in_backward", loop.in_backward)
    together = 1 if in_backward else loop.accumulation * loop.rows // rows
    return replace(loop, rows=rows, accumulation=together, in_backward=in_backward)
