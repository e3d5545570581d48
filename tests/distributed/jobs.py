"""What the tests of strategies train, the same on one device and on many processes."""

import copy
import functools
import inspect
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from zlib import crc32

import torch
import torch.distributed as dist
from extending import SignAdam
from litgpt import GPT
from models import PlainLM, gpt_loss, tiny_gpt, token_batches
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon
from lightning_adapm.litgpt.weights import give_shards, map_weights, take_weights
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.roles.context import normalize
from lightning_adapm.sharding.find import layout_of, local


def on_cuda():
    """Whether this is a process of test_strategies_on_gpu.py; all others train on the CPU."""
    return os.environ.get("STRATEGIES_ON") == "cuda"


def device():
    """This process's."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda() else torch.device("cpu")


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: the weight is stored as inputs by outputs."""

    def __init__(self, outputs, inputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs).normal_(std=0.05))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class TransposedAttention(nn.Module):
    def __init__(self, width, n_head):
        super().__init__()
        self.n_head = n_head
        self.c_attn, self.c_proj = Conv1D(3 * width, width), Conv1D(width, width)

    def forward(self, x):
        q, k, v = (p.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for p in self.c_attn(x).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class InterleavedAttention(nn.Module):
    """GPT-NeoX's fused weight: query, key and value rows of one head after the other."""

    def __init__(self, width, n_head):
        super().__init__()
        self.num_heads = n_head
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.query_key_value(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(y.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Phi-3's: the gate's rows and the up projection's in one weight."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(nn.functional.silu(gate) * up)


def gated_lm():
    model = PlainLM(vocab=61, width=36, n_head=4)
    for layer in model.layers:
        layer.mlp = GatedMLP(36, 25)
    return model


class Experts(nn.Module):
    """Every expert on every token, in one three-dimensional weight each."""

    def __init__(self, count, width):
        super().__init__()
        self.up = nn.Parameter(torch.empty(count, 2 * width, width).normal_(std=0.05))
        self.down = nn.Parameter(torch.empty(count, width, 2 * width).normal_(std=0.05))

    def forward(self, x):
        h = torch.einsum("btd,efd->ebtf", x, self.up).relu()
        return torch.einsum("ebtf,edf->btd", h, self.down)


class OddBlock(nn.Module):
    def __init__(self, width, attn, mlp):
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(width), attn, mlp

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Odd(nn.Module):
    """Layouts that are not plain: transposed and interleaved fused weights, a tied head; stacked experts or none."""

    def __init__(self, vocab=53, width=20, n_head=2, experts=(3, 1)):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        attentions = [TransposedAttention(width, n_head), InterleavedAttention(width, n_head)]
        self.h = nn.ModuleList(
            OddBlock(width, attn, ffn)
            for attn, ffn in zip(
                attentions, [Experts(e, width) if e else nn.Linear(width, width) for e in experts], strict=True
            )
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens[:, :-1] % self.wte.num_embeddings)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(x)
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten() % self.wte.num_embeddings)


# litgpt's RMSNorm computes in float32, whatever the dtype; these are compared in float64.
LAYER_NORM = {"norm_class_name": "LayerNorm"}
MODELS = {
    "plain": lambda: PlainLM(vocab=61, width=36, n_head=4),
    "gpt": lambda: tiny_gpt(n_head=3, n_query_groups=3, n_embd=30, head_size=10, intermediate_size=41, **LAYER_NORM),
    "gqa": lambda: tiny_gpt(n_head=4, n_query_groups=1, n_embd=36, head_size=9, **LAYER_NORM),
    "gated": gated_lm,
    "odd": Odd,
    "transposed": lambda: Odd(experts=(0, 0)),
    "experts": lambda: Odd(experts=(3, 3)),
    "few rows": lambda: PlainLM(vocab=61, width=6, layers=1, n_head=2, n_query_groups=1),
}


@contextmanager
def processes():
    """The process group of a script that was started by :func:`launch.run_processes`."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ['STORE']}"
    if on_cuda():
        torch.cuda.set_device(device())
    backend = "nccl" if on_cuda() else "gloo"
    dist.init_process_group(backend, store, timedelta(seconds=60), rank=rank, world_size=world_size)
    yield rank, world_size
    dist.barrier()
    leave()


def leave():
    """End a process that has done its work: gloo's threads now and then abort an interpreter that shuts down."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


@dataclass
class Job:
    """One training run."""

    model: str = "plain"
    options: dict = field(default_factory=dict)
    steps: int = 12
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
    tolerance: float = 1e-9
    """Of a weight, relative to its norm."""

    def build(self):
        torch.manual_seed(0)
        return MODELS[self.model]().to(self.dtype)

    @property
    def settings(self):
        common = {"lr": 3e-3, "rank": 2, "update_proj_gap": 4, "weight_decay": 0.1}
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
        if self.frozen is None:
            train_share(model, optimizer, batches[:half], rank, world_size, self.broken, self.unseen, self.drawn)
            train_share(model, optimizer, batches[half:], rank, world_size, self.broken, drawn=self.drawn)
            return optimizer
        for _, param in self._named(model, frozen=True):
            param.requires_grad_(False)
        train_share(model, optimizer, batches[:half], rank, world_size)
        for _, param in self._named(model, frozen=True):
            param.requires_grad_(True)
        optimizer.add_param_group({"params": self._named(model, frozen=True), "lr": 1e-3})
        train_share(model, optimizer, batches[half:], rank, world_size)
        return optimizer

    def batches(self):
        return token_batches(self.steps, size=(8, 9))


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


def train_share(model, optimizer, batches, rank=0, world_size=1, broken=None, unseen=None, drawn=False):
    """Every process takes its share of each batch; strategies average the gradients.

    At every third step, the gradient of the parameter whose name has ``broken`` in it is NaN in its first element. That
    of the last matrix of stacks whose names have ``unseen`` in them is zero.
    """
    for step, tokens in enumerate(batches):
        optimizer.zero_grad()
        loss_of(model, tokens.chunk(world_size)[rank].to(next(model.parameters()).device)).backward()
        for name, param in model.named_parameters() if broken and step % 3 == 0 else ():
            layout = layout_of(param)
            if broken in name and (layout is None or layout.held[0] == 0 < layout.held[1]):
                local(param.grad).view(-1)[0] = float("nan")
        for name, param in model.named_parameters() if unseen else ():
            layout = layout_of(param)
            if unseen in name and (layout is None or layout.held[1] == layout.shape.numel() > layout.held[0]):
                local(param.grad)[-1].zero_()
        if drawn:
            draw_gradients(model, step)
        optimizer.step()


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


def blocks_of(model):
    """The modules that are wrapped by themselves."""
    model = getattr(model, "_fsdp_wrapped_module", model)
    if isinstance(model, GPT):
        return list(model.transformer.h)
    return list(model.layers if isinstance(model, PlainLM) else model.h)


def shard(model, mesh=None):
    """FSDP2, as it is used: every block, then the rest."""
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def flatten(model, **options):
    """FSDP1, likewise: every block is one flat parameter, and the rest another."""
    policy = CustomPolicy(lambda module: any(module is block for block in blocks_of(model)))
    options |= {"auto_wrap_policy": policy, "use_orig_params": True, "device_id": device()}
    return FullyShardedDataParallel(model, **options)


def checkpointed(model):
    """With a wrapper around every block, which recomputes its activations."""
    blocks = blocks_of(model)
    apply_activation_checkpointing(model, check_fn=lambda module: any(module is block for block in blocks))
    return model


def shard_without_memory(model):
    """FSDP2 of a model on the meta device, whose weights are loaded where they will stay."""
    weights = model.state_dict()
    sharded = shard(model.to("meta")).to_empty(device=device())
    set_model_state_dict(sharded, weights, options=StateDictOptions(full_state_dict=True))
    return sharded


def shard_from_file(model):
    """FSDP2 of a model whose weights are mapped from a file, of which each process reads its share."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save(model.state_dict(), path)
        saved = map_weights(path)
    take_weights(model, next(model.parameters()).dtype)
    give_shards(shard(model), saved)
    return model


compiled = functools.partial(torch.compile, backend="eager")  # as any backend, it wraps: code is another matter


def pairs():
    """Every two processes hold the model together, as on the nodes of a cluster."""
    return init_device_mesh(device().type, (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))


WRAP = {
    "single": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp1": flatten,
    "fsdp2": shard,
    "hybrid1": lambda model: flatten(model, device_mesh=pairs(), sharding_strategy=ShardingStrategy.HYBRID_SHARD),
    "hybrid2": lambda model: shard(model, pairs()),
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled ddp of checkpointed": lambda model: compiled(DistributedDataParallel(checkpointed(model))),
    "fsdp1 of checkpointed": lambda model: flatten(checkpointed(model)),
    "checkpointed fsdp1": lambda model: checkpointed(flatten(model)),
    "fsdp2 of checkpointed": lambda model: shard(checkpointed(model)),
    "compiled fsdp2": lambda model: compiled(shard(model)),
    "fsdp2 from meta": shard_without_memory,
    "fsdp2 from file": shard_from_file,
}


def weights_of(model):
    """Whole weights by clean names; on every process, to be called on all of them."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {normalize(name): param.detach().clone() for name, param in model.named_parameters()}
    return {normalize(name): full(param.detach()) for name, param in model.named_parameters()}


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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
    "plain unfrozen": Job("plain", frozen="layers.0"),
    "gpt broken": Job("gpt", broken="qkv"),
    "gated broken": Job("gated", broken="gate_up_proj.weight"),
    "experts broken": Job("experts", broken="h.0.mlp.down", unseen="h.1.mlp"),
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
    "gpt int8": Job("gpt", {"rank": 8, "state_dtype": "int8"}, dtype=torch.float32, tolerance=1e-3),
    "gpt extending": Job("gpt", make=SignAdam),
    # rounded at random as on one device, bit by bit
    "gpt rounding": Job("gpt", {"momentum": "full", "lr": 1e-4}, dtype=torch.bfloat16, drawn=True, tolerance=1e-9),
    "transposed rounding": Job("transposed", {"lr": 1e-4}, dtype=torch.bfloat16, drawn=True, make=Lomo, tolerance=1e-9),
    "gpt zero": Job("gpt", {"second_moment": "block"}, zero=True),
    "gqa zero muon": Job("gqa", make=PartialMuon, zero=True),
    "gpt zero lomo": Job("gpt", make=AdaLomo, zero=True),
    "plain maximize": Job("plain", {"maximize": True, "no_decay": ("norm", "bias")}),
}
