"""DPO: the loss against a plain computation, the frozen reference, and the data of pairs."""

import json
import math

import lightning as L
import pytest
import torch
from finetuning import CONFIG, write_preferences, write_tokenizer
from litgpt.tokenizer import Tokenizer
from trainers import quiet_trainer

from lightning_adapm.litgpt.preference import DPOModule, PreferenceData, answer_log_probs, dpo_margins


def connected(tmp_path, **options):
    data = PreferenceData(str(write_preferences(tmp_path / "pairs.json")), val_split_fraction=0.25, **options)
    data.connect(Tokenizer(write_tokenizer(tmp_path / "tokenizer")), 3, 128)
    data.setup()
    return data


def perturbed():
    module = DPOModule(beta=0.3, config=CONFIG)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return module


def test_loss_is_the_papers(tmp_path):
    """Token by token, pair by pair, in plain numbers."""
    torch.manual_seed(0)
    module, batch = perturbed(), next(iter(connected(tmp_path).train_dataloader()))

    def log_prob(model, row):
        tokens, labels = batch["input_ids"][row], batch["labels"][row]
        table = model(tokens[None]).log_softmax(-1)[0]
        return sum(table[t - 1, tokens[t]].item() for t in range(1, len(tokens)) if labels[t] != -100)

    losses = []
    for pair in range(3):
        ratio = [log_prob(module.model, row) - log_prob(module.reference, row) for row in (pair, 3 + pair)]
        losses.append(math.log(1 + math.exp(-0.3 * (ratio[0] - ratio[1]))))
    module.log_dict = lambda *args, **kwargs: None
    assert module.training_step(batch, 0).item() == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_untrained_policy_has_the_loss_of_a_coin():
    log_probs = torch.tensor([-3.0, -1.0, -2.0, -5.0])
    assert torch.equal(dpo_margins(log_probs, log_probs, 0.1), torch.zeros(2))
    logits, targets = torch.zeros(1, 3, 8), torch.tensor([[-100, 1, 7]])
    assert answer_log_probs(logits, targets).item() == pytest.approx(-2 * math.log(8))


def test_training_prefers_the_chosen_and_leaves_the_reference(tmp_path):
    L.seed_everything(0)
    data = PreferenceData(str(write_preferences(tmp_path / "pairs.json")), val_split_fraction=0.25)
    tokenizer = str(write_tokenizer(tmp_path / "tokenizer"))
    module = DPOModule(beta=0.5, config=CONFIG, tokenizer_dir=tokenizer, micro_batch_size=6, adapm={"lr": 3e-3})
    before = {name: value.clone() for name, value in module.reference.state_dict().items()}
    run = quiet_trainer(tmp_path, max_epochs=4, enable_checkpointing=False)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val_loss"] < 0.6 * math.log(2)
    assert run.callback_metrics["val_accuracy"] == 1
    assert all(torch.equal(value, before[name]) for name, value in module.reference.state_dict().items())
    assert not any(parameter in run.optimizers[0].state for parameter in module.reference.parameters())
    assert not module.train().reference.training


def test_pairs_are_laid_out_and_masked(tmp_path):
    data = connected(tmp_path)
    batch, tokenizer = next(iter(data.train_dataloader())), data.tokenizer
    answers = [tokenizer.decode(t[mask]) for t, mask in zip(batch["input_ids"], batch["labels"] != -100, strict=True)]
    assert all(answer.startswith(("red", "green", "blue", "white")) for answer in answers[:3])
    assert all(answer.startswith("no") for answer in answers[3:])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ([{"prompt": "a", "chosen": "b"}] * 2, r"pair 0 .* must have the texts prompt, chosen, rejected.*chosen"),
        ([], "at least two pairs"),
        ({}, "at least two pairs"),
    ],
)
def test_bad_files_are_refused(tmp_path, content, error):
    (tmp_path / "pairs.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=error):
        PreferenceData(str(tmp_path / "pairs.json")).setup()


def test_a_file_that_is_no_json_is_refused(tmp_path):
    for name in ("pairs.json", "pairs.jsonl"):
        (tmp_path / name).write_text('{"prompt": ')
        with pytest.raises(
            ValueError, match=rf"`json_path`: '.*{name}' is not JSON .*; give a list of {{prompt, chosen"
        ):
            PreferenceData(str(tmp_path / name)).setup()


def test_answers_that_are_cut_off_are_noticed():
    module = DPOModule(config=CONFIG)
    module.log_dict = lambda *args, **kwargs: None
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with pytest.warns(UserWarning, match="first batch has no token to predict"):
        module.training_step({"input_ids": tokens, "labels": torch.full_like(tokens, -100)}, 0)


def test_pairs_may_lie_in_lines(tmp_path):
    path = write_preferences(tmp_path / "pairs.json")
    lines = path.with_suffix(".jsonl")
    lines.write_text("\n".join([*map(json.dumps, json.loads(path.read_text())), ""]))
    one, other = PreferenceData(str(path)), PreferenceData(str(lines))
    for data in (one, other):
        data.setup()
    assert (one._train, one._val) == (other._train, other._val)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`val_split_fraction` must lie between 0 and 1, but got 1"):
        PreferenceData(str(write_preferences(tmp_path / "pairs.json")), val_split_fraction=1)
    with pytest.raises(FileNotFoundError, match="`json_path`"):
        PreferenceData(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="`beta` must be positive, but got 0"):
        DPOModule(beta=0, config=CONFIG)
