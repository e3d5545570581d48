"""Studies on tokens: the text as tokens, and the loss of a vocabulary whose logits are never all there."""

import dataclasses
import math
import re

import pytest
import torch

from benchmarks.pages.report import report
from benchmarks.studies import Study, adamw, head, sweep
from benchmarks.studies.base import Pretraining
from benchmarks.studies.copies import Copies
from benchmarks.studies.decoder import Shape
from benchmarks.studies.setting import Device, Setting
from benchmarks.studies.store import Store
from benchmarks.studies.tokens import Answers, Tokens

CPU = Device()
TINY = Setting(Shape(layers=1, width=16, n_head=2, context=8, vocab=300), steps=2, batch=2, val_windows=4)


@pytest.fixture
def prose(tmp_path):
    file = tmp_path / "prose.txt"
    file.write_text("".join(f"line {number} of a text, and é\n" for number in range(4000)))
    return file


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "some.jsonl"
    lines = (f'{{"question": "line {number}?", "answer": "a text {number}"}}\n' for number in range(40))
    file.write_text("".join(lines))
    return file


def test_tokens_are_made_once_and_are_those_of_the_text(prose, monkeypatch):
    text = Tokens(prose, 300).read()
    assert text.train.dtype == torch.int16 and text.train.max() < 300
    assert {file.suffix for file in prose.parent.glob("prose.txt.bpe300-*")} == {".json", ".pt"}
    monkeypatch.setattr("lightning_adapm.data.tokens.train_tokenizer", None)
    again = Tokens(prose, 300).read()
    assert again.name == text.name and torch.equal(again.train, text.train) and torch.equal(again.val, text.val)
    prose.write_text("another\n" * 100)
    with pytest.raises(TypeError):  # nothing is kept of this text
        Tokens(prose, 300).read()


def test_questions_and_answers_are_no_text_for_tokens(tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text('{"question": "why?", "answer": "so"}\n' * 40)
    with pytest.raises(ValueError, match="plain text"):
        Tokens(file, 300).read()


@pytest.mark.parametrize("llama", [False, True])
def test_a_loss_by_parts_of_the_logits_has_the_gradients_of_the_whole(llama, monkeypatch):
    copies = Copies(dataclasses.replace(TINY, shape=dataclasses.replace(TINY.shape, llama=llama)), [0], CPU, None)
    windows = torch.randint(300, (1, 2, 9), generator=torch.Generator().manual_seed(0))
    windows[0, 0, 2:6] += 300  # read, but no targets
    found = []
    for large in (1000, 200):
        monkeypatch.setattr("benchmarks.studies.copies.LARGE", large)
        monkeypatch.setattr(head, "POSITIONS", 5)
        copies.backward(windows)
        with torch.no_grad():
            losses = copies.losses(windows)
        found.append([losses, *(param.grad for param in copies.models[0].parameters())])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-7, rtol=1e-5)


def test_a_loss_by_parts_of_the_logits_is_added_up_in_float32(monkeypatch):
    """Sums in the dtype of bfloat16 weights would have three digits."""
    monkeypatch.setattr(head, "POSITIONS", 5)
    hidden, weight = torch.randn(20, 4).bfloat16(), torch.randn(30, 4).bfloat16()
    targets = torch.arange(20)
    whole = torch.nn.functional.cross_entropy((hidden @ weight.T).float(), targets)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            loss = head.mean_loss(hidden, weight, targets, torch.bfloat16, head.losses_and_slopes)
        torch.testing.assert_close(loss, whole, atol=1e-6, rtol=1e-5)


def test_a_study_on_tokens_trains_and_its_page_says_so(prose, tmp_path):
    study = Study("Which?", {"AdamW": adamw()}, (1e-3,), (), 1, TINY, curves=True)
    store = Store(tmp_path / "results" / "study.json")
    sweep.sweep([(study, store)], prose, CPU, jobs=1, stack=1, deadline=math.inf)
    report("study", study, Store(store.path))
    page = store.path.with_suffix(".md").read_text()
    assert "a vocabulary of 300 tokens; 2 steps of 2 x 8 tokens" in page and "nats per token" in page
    assert "| state | seconds |" in page and re.search(r"\| 100\.\d\d% \|", page)


def test_answers_are_read_in_the_vocabulary_of_another_text(prose, questions):
    text, tokenizer = Answers(questions, Tokens(prose, 300)).read(), Tokens(prose, 300).tokenizer()
    begin, end = text.starts[0][3], text.starts[0][4]
    record = text.train[begin:end]
    assert tokenizer.decode((record[record >= 300] - 300).tolist()) == "line 3?\n"
    assert tokenizer.decode(record[record < 300].tolist()) == "a text 3\n\n"
    prose.write_text("another text\n" * 4000)
    assert Answers(questions, Tokens(prose, 300)).read().name != text.name


def test_finetuning_starts_from_one_model_and_adapters_alone_may_learn(prose, questions, tmp_path):
    """A learning rate of nothing leaves the loss of the pretrained weights, whatever the seed."""
    study = Study(
        "Which?", {"AdamW": adamw(), "LoRA": adamw()}, (1e-9, 1e-2), (), 2,
        dataclasses.replace(TINY, shape=dataclasses.replace(TINY.shape, llama=True)), pretrained=True,
        pretraining=Pretraining(lr=1e-2, steps=3, once=True), changes={"LoRA": {"adapters": 2}},
        first=(("AdamW", 1e-2, 2),),
    )  # fmt: skip
    store = Store(tmp_path / "results" / "study.json")
    sweep.sweep([(study, store)], questions, CPU, jobs=1, stack=1, deadline=math.inf, first_text=prose)
    losses = {(e.run["setting"].get("adapters", 0), e.run["lr"], e.run["seed"]): e.result for e in store.own.values()}
    still = [result["val_loss"] for (_, lr, _), result in losses.items() if lr == 1e-9]
    assert still == pytest.approx([still[0]] * 4, abs=1e-5) and len(losses) == 9
    assert losses[2, 1e-2, 0]["val_loss"] < still[0] and losses[2, 1e-2, 0]["state"] < losses[0, 1e-2, 0]["state"]
    assert losses[0, 1e-2, 0]["val_loss"] != losses[0, 1e-2, 1]["val_loss"]
    report("study", study, Store(store.path))
    assert "at 0.01 in 3 such steps on another text" in store.path.with_suffix(".md").read_text()
