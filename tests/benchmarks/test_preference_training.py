"""Preference tuning of a study's weights: the conversion for litgpt, the pairs, and the command."""

import json
import sys

import pytest
import torch
from finetuning import write_tokenizer
from litgpt import GPT, Config

from benchmarks import preference_training
from benchmarks.preference_training import litgpt_config, litgpt_weights, pairs_of
from benchmarks.studies.decoder import Shape

TINY = Shape(layers=2, width=32, n_head=4, n_query_groups=2, context=64, vocab=320, llama=True)


def test_a_converted_model_computes_the_same():
    torch.manual_seed(0)
    ours, theirs = TINY.build(), GPT(Config(**litgpt_config(TINY)))
    theirs.load_state_dict(litgpt_weights(ours.state_dict()))
    tokens = torch.randint(320, (2, 9))
    torch.testing.assert_close(theirs(tokens).flatten(0, 1), ours(tokens), atol=1e-5, rtol=1e-5)


def test_every_row_is_tuned_and_a_rejected_answer_has_one_other_number(tmp_path, monkeypatch):
    lines = [{"question": f"{n} + {n}?", "answer": f"{n} and {n} is {2 * n}."} for n in range(24)]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"question": "why?", "answer": "so"}])))
    pairs = pairs_of(file, 100)
    assert len(pairs) == 24
    for words in ((pair["chosen"].split(), pair["rejected"].split()) for pair in pairs):
        assert sum(a != b for a, b in zip(*words, strict=True)) == 1
    torch.save(TINY.build().state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr(preference_training, "ROWS", {k: preference_training.ROWS[k] for k in ("AdamW", "PartialMuon")})
    words = ["", "--weights", str(tmp_path / "weights.pt"), "--data", str(file), "--output", str(tmp_path)]
    vocabulary = write_tokenizer(tmp_path / "tokenizer") / "tokenizer.json"
    monkeypatch.setattr(sys, "argv", [*words, "--vocabulary", str(vocabulary), "--batch", "8"])
    preference_training.main(TINY)
    rows = json.loads((tmp_path / "preference_training.json").read_text())["rows"]
    assert {label: [run["lr"] for run in runs] for label, runs in rows.items()} == {
        "AdamW": [3e-5, 1e-4, 1e-5],
        "PartialMuon": [1e-4, 3e-4, 3e-5],
    }
    assert all(run["loss"] == pytest.approx(0.693, abs=0.1) for runs in rows.values() for run in runs)
    assert "| PartialMuon | 0.0001 |" in (tmp_path / "preference_training.md").read_text()
