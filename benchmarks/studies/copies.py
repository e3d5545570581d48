"""One model per seed, trained side by side: what an optimizer sees of them, their losses and gradients."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.studies.adapters import adapt
from benchmarks.studies.compiled import compile_blocks, fastest_attention
from benchmarks.studies.decoder import Decoder
from benchmarks.studies.head import IGNORED, LARGE, losses_and_slopes, mean_loss
from benchmarks.studies.setting import Device, Setting
from benchmarks.studies.text import NO_TARGET


class Copies:
    """One model per seed. More than one share every kernel (``torch.func.vmap``); each has parameters of its own,
    views of one buffer ``flat`` ``(copies, parameters)``, which are what an optimizer sees.
    """

    def __init__(self, setting: Setting, seeds: list[int], device: Device, start: list[Path] | None) -> None:
        self.setting, self.device, models = setting, device, []
        self.no_target = max(NO_TARGET, setting.shape.vocab)
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(setting.shape.build())
        for model, path in zip(models, start or [], strict=False):
            model.load_state_dict(torch.load(path, weights_only=True))
        if setting.adapters:
            for model in models:
                adapt(model, setting.adapters)
        self.models = [model.to(device.type, getattr(torch, setting.weights)) for model in models]
        self.flat = torch.stack([nn.utils.parameters_to_vector(model.parameters()) for model in models]).detach()
        self.stacked, offset = {}, 0
        for name, first in models[0].named_parameters():
            part = self.flat[:, offset : offset + first.numel()].view(len(models), *first.shape)
            for model, own in zip(models, part, strict=True):
                model.get_parameter(name).data = own
            self.stacked[name] = part.requires_grad_()
            offset += first.numel()
        self.forward: Callable[[Tensor], Tensor] = self._together if len(models) > 1 else self._alone
        if device.compile:
            compile_blocks(self.models[0])
        self.attention = fastest_attention if device.compile else nullcontext
        self.slope = torch.compile(losses_and_slopes, dynamic=False) if device.compile else losses_and_slopes

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for index, model in enumerate(self.models):
            for name, param in model.named_parameters():
                if param.requires_grad:
                    yield f"copy{index}.{name}", param

    def losses(self, windows: Tensor) -> Tensor:
        """Mean loss of each copy over the targets, in nats, on its ``windows`` ``(copies, batch, context + 1)``."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.setting.bf16), self.attention():
            if self.setting.shape.vocab > LARGE and len(self.models) == 1:
                return self._by_parts_of_logits(windows[0])
            logits = self.forward(windows[..., :-1] % self.no_target)
        each = logits.shape[1] // windows.shape[1]  # a decoder predicts every byte, a classifier the last
        targets = windows[..., -each:].flatten(1)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(),
            targets.masked_fill(targets >= self.no_target, IGNORED).flatten(),
            ignore_index=IGNORED,
            reduction="none",
        )
        return losses.view_as(targets).sum(dim=1) / (targets < self.no_target).sum(dim=1).clamp_min(1)

    def _by_parts_of_logits(self, windows: Tensor) -> Tensor:
        """Loss of a single decoder whose logits would take several times the memory of everything else."""
        decoder = cast(Decoder, self.models[0])
        dtype = torch.bfloat16 if self.setting.bf16 else decoder.head.dtype
        hidden, targets = decoder.hidden(windows[:, :-1] % self.no_target), windows[:, 1:].flatten()
        targets = targets.masked_fill(targets >= self.no_target, IGNORED)
        return mean_loss(hidden, decoder.head, targets, dtype, self.slope).unsqueeze(0)

    def _alone(self, tokens: Tensor) -> Tensor:
        return self.models[0](tokens[0]).unsqueeze(0)

    def _together(self, tokens: Tensor) -> Tensor:
        def one(params: dict[str, Tensor], own: Tensor) -> Tensor:
            return torch.func.functional_call(self.models[0], params, (own,))

        with sdpa_kernel(SDPBackend.MATH):  # fused kernels do not know under vmap that a backward follows
            return torch.func.vmap(one)(self.stacked, tokens)

    def backward(self, windows: Tensor) -> None:
        leaves = self.stacked.values() if len(self.models) > 1 else self.models[0].parameters()
        for leaf in leaves:
            leaf.grad = None
        self.losses(windows).sum().backward()

    def share_gradients(self) -> None:
        """Give every copy its part of the stacked gradients."""
        if len(self.models) > 1:
            for index, model in enumerate(self.models):
                for name, param in model.named_parameters():
                    param.grad = self.stacked[name].grad[index]  # type: ignore[index]

    def recorded(self, windows: Tensor) -> Callable[[], None]:
        """Forward and backward on whatever ``windows`` then holds, as a CUDA graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.backward(windows)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        for param in (*self.stacked.values(), *self.models[0].parameters()):
            param.grad = None
        with torch.cuda.graph(graph):
            self.losses(windows).sum().backward()
        self.share_gradients()  # once: a replay writes into the same tensors
        return graph.replay
