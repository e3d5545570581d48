"""Small models that the tests train: plainly named separate projections, and litgpt's fused ones."""

import torch
import torch.nn.functional as F
from litgpt import GPT, Config
from litgpt.config import configs
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Attention(nn.Module):
    """Grouped-query attention with separate projections and the usual names."""

    def __init__(self, width: int, n_head: int, n_query_groups: int, bias: bool) -> None:
        super().__init__()
        self.n_head, self.n_query_groups, self.head_size = n_head, n_query_groups, width // n_head
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, n_query_groups * self.head_size, bias=bias)
        self.v_proj = nn.Linear(width, n_query_groups * self.head_size, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, n_head: int, n_query_groups: int, bias: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = Attention(width, n_head, n_query_groups, bias)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width, bias=bias), nn.GELU(), nn.Linear(3 * width, width, bias=bias)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class PlainLM(nn.Module):
    """A decoder with the names most code uses; ``forward`` gives the next-token loss of ``(b, t)`` tokens."""

    def __init__(
        self,
        vocab: int = 61,
        width: int = 32,
        layers: int = 2,
        n_head: int = 4,
        n_query_groups: int = 2,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, n_head, n_query_groups, bias) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


class PlainTraining:
    """Makes a LightningModule, as a base class before it, train a :class:`PlainLM` for up to 30 batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PlainLM()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(token_batches(30), batch_size=1)


def names_alone(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names with parameters that no module holds, as what remains of a model."""
    return [(name, nn.Parameter(param.detach().clone())) for name, param in model.named_parameters()]


def tiny_gpt(**fields: object) -> GPT:
    """A litgpt GPT with grouped queries and a Llama MLP, initialized as litgpt initializes."""
    config = {
        "n_layer": 2,
        "n_head": 4,
        "n_query_groups": 2,
        "n_embd": 32,
        "block_size": 32,
        "padded_vocab_size": 61,
        "intermediate_size": 48,
        "mlp_class_name": "LLaMAMLP",
        "norm_class_name": "RMSNorm",
        "rotary_percentage": 1.0,
        "bias": False,
    } | fields
    model = GPT(Config(**config))
    model.apply(model._init_weights)
    return model


def litgpt_families() -> list[str]:
    """One configuration of litgpt for each combination of what decides the names and the rows."""
    keys = (
        "n_head",
        "n_query_groups",
        "head_size",
        "mlp_class_name",
        "n_expert",
        "norm_qk",
        "bias",
        "latent_attention",
    )
    shapes: dict[tuple[str, ...], str] = {}
    for fields in configs:
        shapes.setdefault(tuple(str(fields.get(key)) for key in keys), fields["name"])
    return sorted(shapes.values())


def litgpt_on_meta(name: str) -> GPT:
    """A litgpt configuration with at most two layers, without memory."""
    config = Config.from_name(name)
    if not config.sliding_window_indices:  # these say something of every layer
        config = Config.from_name(name, n_layer=min(2, config.n_layer))
    with torch.device("meta"):
        return GPT(config)


class SeparateQKV(nn.Module):
    """Stands in for litgpt's fused ``attn.qkv`` with three weights that hold the same numbers."""

    def __init__(self, fused: nn.Linear, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        for name, part in zip(("q_proj", "k_proj", "v_proj"), fused.weight.detach().split(sizes), strict=True):
            linear = nn.Linear(fused.in_features, part.shape[0], bias=False, dtype=part.dtype)
            linear.weight.data.copy_(part)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def separate(model: GPT) -> GPT:
    """Replace every fused qkv of ``model`` by :class:`SeparateQKV`."""
    config = model.config
    sizes = (config.n_head * config.head_size, *[config.n_query_groups * config.head_size] * 2)
    for block in model.transformer.h:
        block.attn.qkv = SeparateQKV(block.attn.qkv, sizes)
    return model


def gpt_loss(model: GPT, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def token_batches(steps: int, vocab: int = 61, size: tuple[int, int] = (4, 17), seed: int = 0) -> list[Tensor]:
    """Batches with something to learn: each token follows from the one before it, with noise."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(steps):
        start = torch.randint(vocab, (size[0], 1), generator=generator)
        noise = torch.randint(3, size, generator=generator)
        batches.append((start + 5 * torch.arange(size[1]) + noise.cumsum(1)) % vocab)
    return batches


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> list[float]:
    """Train on ``batches`` in order; the losses."""
    losses = []
    for tokens in batches:
        loss = gpt_loss(model, tokens) if isinstance(model, GPT) else model(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Norm-relative difference of two tensors."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()
