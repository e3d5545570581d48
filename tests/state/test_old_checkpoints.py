"""States that version 0.1.0 saved go on as they did there."""

import io
import lzma
from pathlib import Path

import pytest
import torch
from models import tiny_gpt, token_batches, train

from lightning_adapm import AdaLomo, AdaPM, LoRAPre

FILE = Path(__file__).parents[1] / "data" / "optimizers-0.1.0.pt.xz"
"""By run: options, weights and optimizer state after 6 of 12 steps, and the weights after all of them."""


PAPER = {"momentum": "paper", "state_dtype": None}
"""What were AdaPM's defaults there; the options state the rank."""


@pytest.fixture(scope="module")
def saved():
    return torch.load(io.BytesIO(lzma.decompress(FILE.read_bytes())), weights_only=True)


@pytest.mark.parametrize("name", ["AdaPM elementwise", "AdaPM block", "AdaPM factored", "LoRAPre", "AdaLomo"])
def test_a_run_continues(saved, name):
    run, make = saved["runs"][name], {"AdaPM": AdaPM, "LoRAPre": LoRAPre, "AdaLomo": AdaLomo}[name.split()[0]]
    model = tiny_gpt(**saved["model"])
    model.load_state_dict(run["weights"])
    optimizer = make(model.parameters(), **((PAPER if make is AdaPM else {}) | run["options"]))
    optimizer.load_state_dict(run["optimizer"])
    train(model, optimizer, token_batches(12, vocab=saved["model"]["padded_vocab_size"], size=(4, 9))[6:])
    atol = 1e-4 if make is LoRAPre else 1e-6  # where both runs of LoRAPre are up to 6e-4 from one in float64
    for key, expected in run["after"].items():
        torch.testing.assert_close(model.state_dict()[key], expected, rtol=1e-4, atol=atol)
    assert {key for state in optimizer.state.values() for key in state} == {
        key for state in run["optimizer"]["state"].values() for key in state
    }


@pytest.mark.filterwarnings("ignore:AdaPM goes on")
def test_a_run_goes_on_with_the_defaults_of_today(saved):
    """What was low-rank and is full goes on as codes of its product, and what had no momentum begins with none."""
    run = saved["runs"]["AdaPM elementwise"]
    model = tiny_gpt(**saved["model"])
    model.load_state_dict(run["weights"])
    optimizer = AdaPM(model.parameters())
    optimizer.load_state_dict(run["optimizer"])
    head, table = (optimizer.state[weight] for weight in (model.lm_head.weight, model.transformer.wte.weight))
    assert head["exp_avg_codes"].dtype == table["exp_avg_codes"].dtype == torch.int8
    assert head["exp_avg_codes"].count_nonzero() and not table["exp_avg_codes"].count_nonzero()
    assert optimizer.state[model.transformer.h[0].mlp.proj.weight]["exp_avg_l"].dtype == torch.bfloat16
    train(model, optimizer, token_batches(12, vocab=saved["model"]["padded_vocab_size"], size=(4, 9))[6:])
    assert table["exp_avg_codes"].count_nonzero()
    for key, expected in run["after"].items():
        torch.testing.assert_close(model.state_dict()[key], expected, rtol=0.1, atol=0.1)
