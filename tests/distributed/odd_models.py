"""Small models with every layout of weights: fused, interleaved, transposed, tied, stacked, with few rows."""

import torch
from models import PlainLM, tiny_gpt
from torch import nn


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


class GPTNeoXAttention(nn.Module):
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
    """Layouts that are not plain: transposed and interleaved fused weights, a tied head; stacked experts or none; one
    matrix and one vector in three dimensions.
    """

    def __init__(self, vocab=53, width=20, n_head=2, experts=(3, 1), positions=False):
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        if positions:
            self.pos = nn.Parameter(torch.zeros(1, 8, width))
            self.gain = nn.Parameter(torch.ones(width, 1, 1))
        attentions = [TransposedAttention(width, n_head), GPTNeoXAttention(width, n_head)]
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
        if hasattr(self, "pos"):
            x = x * self.gain.flatten() + self.pos
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
    "positions": lambda: Odd(experts=(0, 0), positions=True),
    "experts": lambda: Odd(experts=(3, 3)),
    "few rows": lambda: PlainLM(vocab=61, width=6, layers=1, n_head=2, n_query_groups=1),
}
