"""What holds for every optimizer of the package."""

import copy
import inspect
import warnings

import pytest
import torch
from models import PlainLM, gpt_loss, tiny_gpt, token_batches
from torch import nn

from benchmarks import optimizer_memory
from lightning_adapm import AdaLomo, AdamMini, AdaPM, Lomo, LoRAPre, PartialMuon, explain
from lightning_adapm.report.plan import measure

MAKE = {
    "adapm": lambda params: AdaPM(params, lr=1e-2, rank=2, update_proj_gap=3),
    "adapm block": lambda params: AdaPM(params, lr=1e-2, rank=2, second_moment="block"),
    "adapm factored": lambda params: AdaPM(params, lr=1e-2, rank=2, second_moment="factored"),
    "adapm bfloat16": lambda params: AdaPM(params, lr=1e-2, rank=2, state_dtype={"low_rank": "bfloat16"}),
    "adapm int8": lambda params: AdaPM(params, lr=1e-2, rank=8, update_proj_gap=3, state_dtype="int8"),
    "adapm in backward": lambda params: AdaPM(params, lr=1e-2, rank=2, update_in_backward=True),
    "adam-mini": lambda params: AdamMini(params, lr=1e-2),
    "adam-mini int8": lambda params: AdamMini(params, lr=1e-2, state_dtype="int8"),
    "adalomo": lambda params: AdaLomo(params, lr=5e-2),
    "lomo": lambda params: Lomo(params, lr=0.5),
    "partial muon": lambda params: PartialMuon(params, lr=1e-2, rank=2, update_proj_gap=3),
    "muon": lambda params: PartialMuon(params, lr=1e-2, momentum="full", second_moment="elementwise"),
    "partial muon bfloat16": lambda params: PartialMuon(params, lr=1e-2, rank=2, state_dtype="bfloat16"),
    "partial muon int8": lambda params: PartialMuon(params, lr=1e-2, rank=8, state_dtype=torch.int8),
    "lora-pre": lambda params: LoRAPre(params, lr=1e-2, rank=2),
    "lora-pre jacobi": lambda params: LoRAPre(params, lr=1e-2, rank=2, order="jacobi"),
    "lora-pre int8": lambda params: LoRAPre(params, lr=1e-2, rank=8, state_dtype="int8"),
    "lora-pre muon": lambda params: LoRAPre(params, lr=1e-2, rank=2, variant="muon"),
}


@pytest.fixture(params=MAKE)
def make(request):
    return MAKE[request.param]


def train(model, optimizer, batches):
    losses = []
    for tokens in batches:

        def closure(tokens=tokens):
            optimizer.zero_grad()
            loss = gpt_loss(model, tokens) if hasattr(model, "transformer") else model(tokens)
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
    return losses


def test_docstrings_list_every_option_and_every_entry_of_the_state(make):
    model = tiny_gpt()
    optimizer = make(model.named_parameters())
    train(model, optimizer, token_batches(1))
    text, options = inspect.getdoc(type(optimizer)), inspect.signature(type(optimizer)).parameters.values()
    assert [
        each.name for each in options if each.kind is not each.VAR_KEYWORD and f"    {each.name}: " not in text
    ] == []
    entries = {key.rpartition(".")[2] for state in optimizer.state.values() for key in state}
    stored = {key.removesuffix("_codes").removesuffix("_scale") for key in entries}
    assert [key for key in sorted(stored) if f"``{key}``" not in text] == []
    assert entries == stored or "codes and scales" in text or "_codes``" in text
    assert "Numerics: " in text and "Example::" in text


@pytest.mark.parametrize("build", [PlainLM, tiny_gpt])
def test_learns(make, build):
    torch.manual_seed(0)
    model = build()
    (tokens,) = token_batches(1)
    losses = train(model, make(model.parameters()), [tokens] * 40)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("build", [PlainLM, tiny_gpt])
def test_state_bytes_are_the_planned_ones(make, build):
    model = build()
    optimizer = make(model.parameters())
    planned = explain(optimizer).total
    train(model, optimizer, token_batches(2))
    assert measure(optimizer) == planned


def test_resumed_is_uninterrupted(make, tmp_path):
    torch.manual_seed(0)
    whole = tiny_gpt()
    optimizer = make(whole.parameters())
    batches = token_batches(12)
    train(whole, optimizer, batches[:7])
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "seven.pt")
    train(whole, optimizer, batches[7:])
    saved = torch.load(tmp_path / "seven.pt", weights_only=True)
    resumed = tiny_gpt()
    resumed.load_state_dict(saved["model"])
    optimizer = make(resumed.parameters())
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, batches[7:])
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_gradient_in_any_dtype(make, dtype):
    torch.manual_seed(0)
    model = PlainLM().to(dtype)
    optimizer = make(model.parameters())
    top = 1e4 if dtype == torch.float16 else 1e30
    for scale in (0.0, 1.0, 1e-30, top, float("nan"), float("inf"), 1.0):
        for index, param in enumerate(model.parameters()):
            param.grad = None if index % 5 == 4 else (torch.randn_like(param) * scale)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        # plain gradient descent takes a step of any size; what is tested of it is that it takes none from a NaN
        if isinstance(optimizer, Lomo) and scale == top:
            model = PlainLM().to(dtype)
            optimizer = make(model.parameters())
        assert all(p.isfinite().all() for p in model.parameters()), scale


class OddShapes(nn.Module):
    """A scalar, a convolution, a stack of matrices, one entry, and nothing."""

    def __init__(self):
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.tensor(0.7)), nn.Conv2d(2, 5, 3)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.one, self.empty = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.zeros(0, 4))

    def forward(self, images):
        found = self.conv(images).mean((-2, -1)) @ self.experts
        return (self.scale * found * self.one + self.empty.sum()).square().mean()


def test_parameters_of_any_shape(make):
    torch.manual_seed(0)
    model, images = OddShapes(), torch.randn(8, 2, 6, 6)
    optimizer = make([{"params": model.named_parameters(), "role": "mlp"}])
    before = [param.detach().clone() for param in model.parameters()]
    losses = train(model, optimizer, [images] * 5)
    assert losses[-1] < losses[0]
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [param.numel() > 0 for param in model.parameters()]


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (AdaLomo, {"second_moment": "block"}),
        (AdaLomo, {"betas": (0.5, 0.9)}),
        (Lomo, {"state_dtype": "bfloat16"}),
        (LoRAPre, {"momentum": {"lm_head": "none"}}),
        (LoRAPre, {"clip_threshold": 2.0}),
        (AdamMini, {"rank": 3}),
    ],
)
def test_options_without_a_meaning_are_refused(make, option):
    (name,) = option
    with pytest.raises(TypeError, match=name):
        make(PlainLM().parameters(), **option)
    assert name not in inspect.signature(make).parameters
    assert name not in make(PlainLM().parameters()).param_groups[0]


def test_copies_and_frozen_parameters(make):
    torch.manual_seed(0)
    model = PlainLM()
    model.layers[0].requires_grad_(False)
    optimizer = make(model.parameters())
    train(model, optimizer, token_batches(2))
    assert not any(optimizer.state[p] for p in model.layers[0].parameters() if p in optimizer.state)
    twin = copy.deepcopy(optimizer)
    assert twin.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_models_that_are_no_transformers():
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4))
    for make in (MAKE["adalomo"], MAKE["lomo"]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(conv.parameters())


def test_the_page_has_the_planned_memory():
    """After a change of the defaults: python -m benchmarks.optimizer_memory."""
    page = optimizer_memory.PAGE.read_text()
    assert optimizer_memory.table() in page and optimizer_memory.budget() in page
