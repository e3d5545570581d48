"""What the tests of strategies train, the same on one device and on many processes."""

import copy
import inspect
from contextlib import nullcontext
from dataclasses import dataclass, field
from zlib import crc32

import torch
import torch.distributed as dist
from extending import SignAdam
from litgpt import GPT
from models import gpt_loss, token_batches
from odd_models import MODELS
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.roles.context import normalize
from lightning_adapm.sharding.find import layout_of, local

STEPS, HALF = 8, 4
"""Number of steps of most jobs, with two refreshes of every basis, one of them in either half; and of half of them."""


@dataclass
class Job:
    """One training run."""

    model: str = "plain"
    options: dict = field(default_factory=dict)
    steps: int = STEPS
    dtype: torch.dtype = torch.float64
    """Of the parameters."""
    broken: str | None = None
    """In the names of parameters whose gradients are NaN now and then."""
    unseen: str | None = None
    """In the names of stacks whose last expert gets no gradient in the first half of the steps."""
    frozen: str | None = None
    """In the names of parameters that are frozen for half of the steps, and then a parameter group of their own."""
    drawn: bool = False
    """Gradients are drawn, the same however a parameter is shared: no sum over processes has rounded them."""
    make: type = AdaPM
    watched: bool = False
    """By a monitor, in every step."""
    zero: bool = False
    """Under DDP with ZeroRedundancyOptimizer, whatever the strategy of the others; saved and loaded at half."""
    accumulated: int = 1
    """Backward passes whose gradients a step adds up. Processes exchange them in the last one only."""
    clipped: float | None = None
    """Most norm of all gradients together."""
    tolerance: float = 1e-9
    """Of a weight, relative to its norm."""

    def build(self):
        torch.manual_seed(0)
        return MODELS[self.model]().to(self.dtype)

    @property
    def settings(self):
        common = {"lr": 3e-3, "rank": 2, "update_proj_gap": 4, "weight_decay": 0.1, "state_dtype": None}
        if issubclass(self.make, AdaPM):
            common["momentum"] = "compact"  # nearly every role low-rank
        known = inspect.signature(self.make).parameters
        return {name: value for name, value in common.items() if name in known} | self.options

    def optimizer(self, model):
        if self.frozen is None:
            return self.make(model.named_parameters(), **self.settings)
        return self.make(self._named(model, frozen=False), **self.settings)

    def _named(self, model, frozen):
        return [(name, param) for name, param in model.named_parameters() if (self.frozen in name) is frozen]

    def train(self, model, rank=0, world_size=1, optimizer=None):
        """All of the steps; the optimizer."""
        batches, half = self.batches(), self.steps // 2
        optimizer = optimizer or self.optimizer(model)
        optimizer.observer = ResidualProbe() if self.watched else None
        for name, param in model.named_parameters() if self.frozen else ():
            param.requires_grad_(self.frozen not in name)
        train_share(model, optimizer, batches[:half], rank, world_size, self, self.unseen)
        if self.frozen:
            model.requires_grad_(True)
            optimizer.add_param_group({"params": self._named(model, frozen=True), "lr": 1e-3})
        train_share(model, optimizer, batches[half:], rank, world_size, self)
        return optimizer

    def batches(self):
        return token_batches(self.steps, size=(12 * self.accumulated, 9))  # for two, three, four or six processes


def train_zero(job, rank, world_size):
    """The model that a job gives where each process has the state of some parameters only."""
    model, half = DistributedDataParallel(job.build()), job.steps // 2
    optimizer = ZeroRedundancyOptimizer(model.parameters(), job.make, **job.settings)
    train_share(model, optimizer, job.batches()[:half], rank, world_size)
    saved = {}
    for other in range(world_size):
        optimizer.consolidate_state_dict(other)
        if other == rank:
            saved = copy.deepcopy(optimizer.state_dict())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), job.make, **job.settings)
    optimizer.load_state_dict(saved)
    train_share(model, optimizer, job.batches()[half:], rank, world_size)
    assert len(optimizer.optim.state) < len(list(model.parameters()))
    return model


def loss_of(model, tokens):
    inner = getattr(model, "module", model)
    inner = getattr(inner, "_orig_mod", inner)
    return gpt_loss(model, tokens) if isinstance(inner, GPT) else model(tokens)


def train_share(model, optimizer, batches, rank=0, world_size=1, job=None, unseen=None):
    """Every process takes its share of each batch; strategies average the gradients.

    At every third step, the gradient of the parameter whose name has ``job.broken`` in it is NaN in its first element.
    That of the last matrix of stacks whose names have ``unseen`` in them is zero.
    """
    job = job or Job()
    for step, tokens in enumerate(batches):
        optimizer.zero_grad()
        backward(model, tokens.chunk(world_size)[rank].to(next(model.parameters()).device), job.accumulated)
        if job.clipped is not None:
            clip(model, job.clipped)
        for name, param in model.named_parameters() if job.broken and step % 3 == 0 else ():
            layout = layout_of(param)
            if job.broken in name and (layout is None or layout.held[0] == 0 < layout.held[1]):
                local(param.grad).view(-1)[0] = float("nan")
        for name, param in model.named_parameters() if unseen else ():
            layout = layout_of(param)
            if unseen in name and (layout is None or layout.held[1] == layout.shape.numel() > layout.held[0]):
                local(param.grad)[-1].zero_()
        if job.drawn:
            draw_gradients(model, step)
        optimizer.step()


def backward(model, tokens, times):
    """Add up the gradients of so many parts of a share, and exchange them in the last of these."""
    for number, part in enumerate(tokens.chunk(times), 1):
        alone = number < times
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(not alone)
        with model.no_sync() if alone and hasattr(model, "no_sync") else nullcontext():
            (loss_of(model, part) / times).backward()


def clip(model, most):
    """Clip gradients by the norm of all of them. FSDP1's own clipping does not support float64."""
    if not isinstance(model, FullyShardedDataParallel):
        torch.nn.utils.clip_grad_norm_(model.parameters(), most)
        return
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    square = torch.stack([grad.square().sum() for grad in grads]).sum()
    dist.all_reduce(square, group=model.process_group)
    for grad in grads:
        grad.mul_(min(1.0, most / (float(square) ** 0.5 + 1e-6)))


def draw_gradients(model, step):
    """Replace the gradients of a model by random ones, which depend on name and step."""
    for name, param in model.named_parameters():
        layout = layout_of(param)
        shape = param.shape if layout is None else layout.shape
        generator = torch.Generator().manual_seed(crc32(normalize(name).encode()) + step)
        whole = torch.randn(shape, generator=generator).flatten().to(param.device)
        first, last = (0, len(whole)) if layout is None else layout.held
        if param.grad is not None:
            held = local(param.grad)
            held.copy_(whole[first:last].view(held.shape))


ROW_KINDS = ("elementwise", "block", "factored")
JOBS = {
    f"{model} {kind}": Job(model, {"second_moment": kind})
    for model in ("plain", "gpt", "gqa", "gated", "odd", "transposed", "few rows")
    for kind in ROW_KINDS
}
JOBS |= {
    f"{model} {name}": Job(model, options, make=PartialMuon)
    for model in ("plain", "gpt", "gqa", "gated", "odd", "transposed", "few rows")
    for name, options in {"partial muon": {}, "muon": {"momentum": "full", "second_moment": "elementwise"}}.items()
}
JOBS |= {
    "plain gap 1": Job("plain", {"update_proj_gap": 1}),
    "gpt no debias": Job("gpt", {"debias": False}),
    "gpt shard": Job("gpt", {"basis": "shard"}),
    "gpt replicate": Job("gpt", {"basis": "replicate"}),
    "gpt float32": Job("gpt", dtype=torch.float32),
    "gpt state dtypes": Job(
        "gpt", {"state_dtype": {"low_rank": "float16", "full": "float64"}}, dtype=torch.float32, tolerance=1e-3
    ),
    "gpt long": Job("gpt", {"second_moment": "block"}, steps=40),
    "gqa accumulated": Job("gqa", {"second_moment": "block"}, accumulated=2, clipped=0.05),
    "gpt accumulated muon": Job("gpt", make=PartialMuon, accumulated=2, clipped=0.05),
    "plain unfrozen": Job("plain", frozen="layers.0"),
    "gpt broken": Job("gpt", broken="qkv"),
    "gated broken": Job("gated", broken="gate_up_proj.weight"),
    "experts broken": Job("experts", broken="h.0.mlp.down", unseen="h.1.mlp"),
    "positions block": Job("positions", {"second_moment": "block"}),
    "gpt adam-mini": Job("gpt", make=AdamMini),
    "gqa adalomo": Job("gqa", make=AdaLomo),  # a key's bias, which only "plain" has, has noise for a gradient
    "gpt adalomo": Job("gpt", make=AdaLomo),
    "gpt lomo": Job("gpt", {"lr": 0.1}, make=Lomo),
    # its inverses, and second moments near zero where a gradient is, enlarge rounding
    "gpt lora-pre": Job("gpt", make=LoRAPre, tolerance=1e-7),
    "plain lora-pre": Job("plain", make=LoRAPre),
    "gpt lora-pre muon": Job("gpt", {"variant": "muon"}, make=LoRAPre, tolerance=1e-7),
    "gpt maximize muon": Job("gpt", {"maximize": True, "basis": "shard"}, make=PartialMuon),
    "gpt muon float32": Job("gpt", make=PartialMuon, dtype=torch.float32, tolerance=0.05),
    "gpt broken muon": Job("gpt", make=PartialMuon, broken="qkv"),
    "gpt int8": Job(
        "gpt",
        {"rank": 8, "state_dtype": "int8", "second_moment": "factored"},
        dtype=torch.float32,
        tolerance=5e-3,  # gradients that differ by 1e-6 of their size move weights by 1.5e-3 on one device: codes flip
    ),
    "gpt extending": Job("gpt", make=SignAdam),
    # rounded at random as on one device, bit by bit
    "gpt rounding": Job("gpt", {"momentum": "full", "lr": 1e-4}, dtype=torch.bfloat16, drawn=True, tolerance=1e-9),
    "transposed rounding": Job("transposed", {"lr": 1e-4}, dtype=torch.bfloat16, drawn=True, make=Lomo, tolerance=1e-9),
    "gpt zero": Job("gpt", {"second_moment": "factored"}, zero=True),
    "gqa zero muon": Job("gqa", make=PartialMuon, zero=True),
    "gpt zero lomo": Job("gpt", make=AdaLomo, zero=True),
    "plain maximize": Job("plain", {"maximize": True, "no_decay": ("norm", "bias")}),
}
RECORDED_JOBS = {
    "block": Job("gpt", {"second_moment": "block"}, dtype=torch.float32),
    "factored shard": Job("gpt", {"second_moment": "factored", "basis": "shard"}, dtype=torch.float32),
    "replicate": Job("gqa", {"basis": "replicate"}, dtype=torch.float32),
    "muon": Job("gqa", make=PartialMuon, dtype=torch.float32),
}
"""Trained by run_recorded.py."""
