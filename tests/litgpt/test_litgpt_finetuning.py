"""LitGPTModule with checkpoints, LoRA and litgpt's data, and the checkpoint directories that it writes."""

import json
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from finetuning import CONFIG, write_instructions, write_tokenizer
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from litgpt import GPT, Config
from litgpt.data import JSON, Alpaca
from litgpt.utils import check_valid_checkpoint_dir, chunked_cross_entropy
from torchmetrics.text import Perplexity
from trainers import quiet_trainer

from lightning_adapm import LitGPTCheckpoint, explain
from lightning_adapm.litgpt.checkpoint import write_checkpoint
from lightning_adapm.litgpt.module import LitGPTModule, batch_length, batch_rows

LORA = {"lora_r": 2, "lora_alpha": 4, "lora_query": True, "lora_value": True, "lora_mlp": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A litgpt checkpoint directory of random weights."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    module = LitGPTModule(config=CONFIG, tokenizer_dir=str(write_tokenizer(folder / "tokenizer")))
    write_checkpoint(folder / "model", module, module.state_dict())
    return folder / "model"


def trainer(tmp_path, **options):
    return quiet_trainer(tmp_path, **({"enable_checkpointing": False} | options))


def instructions(tmp_path, **options):
    path = write_instructions(tmp_path / "instructions.json")
    return JSON(path, mask_prompt=True, val_split_fraction=0.25, num_workers=0, **options)


def sft_batch():
    labels = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens = labels.clone()
    labels[:, :5] = -100
    return {"input_ids": tokens, "labels": labels}


def test_directory_is_litgpts(base):
    check_valid_checkpoint_dir(base, raise_error=True)
    model = GPT(Config.from_checkpoint(base))
    model.load_state_dict(torch.load(base / "lit_model.pth"))
    assert yaml.safe_load((base / "hyperparameters.yaml").read_text())["model"]["config"]["n_embd"] == 32


def test_a_full_disk_loses_no_earlier_checkpoint(tmp_path, monkeypatch):
    module = LitGPTModule(config=CONFIG, tokenizer_dir=str(write_tokenizer(tmp_path / "tokenizer")))
    write_checkpoint(tmp_path / "model", module, module.state_dict())
    kept = (tmp_path / "model" / "lit_model.pth").read_bytes()

    def fill(weights, path):
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(RuntimeError, match="failed writing"):
        write_checkpoint(tmp_path / "model", module, module.state_dict())
    assert (tmp_path / "model" / "lit_model.pth").read_bytes() == kept
    assert not list((tmp_path / "model").glob("*.partial"))


def test_a_folder_that_cannot_be_written_is_refused_before_training(base, tmp_path):
    (tmp_path / "file").touch()
    callback = LitGPTCheckpoint(str(tmp_path / "file" / "final"))
    module = LitGPTModule(checkpoint_dir=str(base))
    with pytest.raises(
        MisconfigurationException, match="LitGPTCheckpoint: `out_dir`: cannot write to '.*final' .*; give"
    ):
        callback.setup(trainer(tmp_path), module, "fit")


@pytest.mark.parametrize("described", [{}, {"config": CONFIG}, {"config": LORA}], ids=["directory", "fields", "LoRA"])
def test_starts_from_a_checkpoint(base, described):
    saved = GPT(Config.from_checkpoint(base))
    saved.load_state_dict(torch.load(base / "lit_model.pth"))
    module = LitGPTModule(checkpoint_dir=str(base), **described)
    tokens = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(module(tokens), saved(tokens))


def test_lora_trains_its_matrices_alone_and_is_merged(base, tmp_path):
    module = LitGPTModule(checkpoint_dir=str(base), config=LORA, micro_batch_size=4, adapm={"lr": 1e-2})
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    run = trainer(tmp_path, max_steps=4, callbacks=[LitGPTCheckpoint(str(tmp_path / "out"))])
    run.fit(module, datamodule=instructions(tmp_path))
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    merged = LitGPTModule(checkpoint_dir=str(tmp_path / "out"))
    tokens = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(merged(tokens), module.eval()(tokens), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "prompt_style.yaml").is_file()


@pytest.mark.parametrize("chunk", [0, 4, 100])
def test_masked_labels_do_not_count(chunk):
    module, batch = LitGPTModule(config=CONFIG, lm_head_chunk_size=chunk), sft_batch()
    expected = chunked_cross_entropy(module(batch["input_ids"])[:, :-1], batch["labels"][:, 1:], chunk_size=0)
    loss, count = module._loss(batch)
    torch.testing.assert_close(loss, expected)
    assert count == 3 * 7
    batch["labels"].fill_(-100)
    assert module._loss(batch)[0] == 0  # and not NaN


def test_answers_that_are_cut_off_are_noticed(base, tmp_path):
    module = LitGPTModule(checkpoint_dir=str(base), micro_batch_size=4, max_seq_length=16)
    with pytest.warns(UserWarning, match=r"first batch has no token to predict.*max_seq_length.*found: 16"):
        trainer(tmp_path, max_steps=1).fit(module, datamodule=instructions(tmp_path))


def test_perplexity_is_torchmetrics(base, tmp_path):
    module, data = LitGPTModule(checkpoint_dir=str(base), micro_batch_size=4), instructions(tmp_path)
    logged = trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]
    metric = Perplexity(ignore_index=-100)
    for batch in data.val_dataloader():
        metric.update(module(batch["input_ids"][:, :-1]), batch["labels"][:, 1:])
    assert logged["val_ppl"] == pytest.approx(metric.compute().item(), rel=1e-4)


def test_finetuning_learns(base, tmp_path):
    L.seed_everything(0)
    module = LitGPTModule(checkpoint_dir=str(base), micro_batch_size=6, adapm={"lr": 1e-2})
    data, run = instructions(tmp_path), trainer(tmp_path, max_epochs=12, num_sanity_val_steps=0)
    before = run.validate(module, datamodule=data, verbose=False)[0]["val_loss"]
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val_loss"] < 0.6 * before


def test_alpaca_is_read_from_its_folder(base, tmp_path):
    write_instructions(tmp_path / "alpaca.json")
    data = Alpaca(download_dir=tmp_path, file_name="alpaca.json", file_url="", num_workers=0, val_split_fraction=0.25)
    module = LitGPTModule(checkpoint_dir=str(base), micro_batch_size=3, max_seq_length=40)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, datamodule=data)
    assert next(iter(data.train_dataloader()))["input_ids"].shape == (3, 40)


def test_text_files(base, corpus, tmp_path):
    pytest.importorskip("litdata")
    from litgpt.data import TextFiles

    for path in corpus.glob("*.txt"):
        (tmp_path / path.name).write_text(path.read_text() * 4)
    module = LitGPTModule(checkpoint_dir=str(base), micro_batch_size=2, max_seq_length=16)
    data = TextFiles(tmp_path, num_workers=0)
    trainer(tmp_path, max_steps=2, limit_val_batches=1).fit(module, datamodule=data)
    assert next(iter(data.train_dataloader())).shape == (2, 17)


def test_throughput_monitor(base, tmp_path):
    monitor = ThroughputMonitor(batch_rows, length_fn=batch_length, window_size=3)
    module = LitGPTModule(checkpoint_dir=str(base), micro_batch_size=2)
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, max_steps=6, limit_val_batches=0, log_every_n_steps=1, callbacks=[monitor], logger=logger)
    run.fit(module, datamodule=instructions(tmp_path))
    logged = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "train/device/items_per_sec" in logged
    assert "train/device/flops_per_sec" in logged


def test_activation_checkpointing_changes_nothing_but_memory(base):
    plain = LitGPTModule(checkpoint_dir=str(base))
    again = LitGPTModule(checkpoint_dir=str(base), activation_checkpointing=True)
    assert list(plain.state_dict()) == list(again.state_dict())
    for module in (plain, again):
        module._loss(sft_batch())[0].backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert [row.role for row in explain(again)] == [row.role for row in explain(plain)]


@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": True}, {"config": LORA | {"lora_head": True}}], ids=["plain", "tied", "LoRA"]
)
def test_logits_in_chunks_change_nothing_but_memory(base, options):
    whole, chunked = (LitGPTModule(checkpoint_dir=str(base), lm_head_chunk_size=size, **options) for size in (0, 4))
    chunked.load_state_dict(whole.state_dict())
    kept = []
    for module in (whole, chunked):
        with torch.autograd.graph.saved_tensors_hooks(lambda value: kept[-1].append(value.shape) or value, lambda x: x):
            kept.append([])
            loss, _ = module._loss(sft_batch())
        loss.backward()
    for one, other in zip(whole.parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert [any(shape[-1:] == (320,) for shape in shapes) for shapes in kept] == [True, False]  # logits
    assert list(chunked.state_dict()) == list(whole.state_dict())


def test_what_is_wrong_is_said_before_training(base, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`checkpoint_dir`: '.*nowhere' does not exist"):
        LitGPTModule(checkpoint_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"has no lit_model.pth"):
        LitGPTModule(config=CONFIG, checkpoint_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"of another model: .* has shape \(320, 32\) there and \(320, 16\)"):
        LitGPTModule(config=CONFIG | {"n_embd": 16}, checkpoint_dir=str(base))
    with pytest.raises(ValueError, match=r"of another model: transformer.h.2.* has shape None there"):
        LitGPTModule(config=CONFIG | {"n_layer": 3}, checkpoint_dir=str(base))
    with pytest.raises(ValueError, match=r"`micro_batch_size` must be at least 1, but got 0"):
        LitGPTModule(config=CONFIG, micro_batch_size=0)
    for folder, error in ((None, "litgpt's data modules need a tokenizer"), (str(tmp_path), "neither tokenizer.json")):
        module = LitGPTModule(config=CONFIG, tokenizer_dir=folder)
        with pytest.raises((ValueError, FileNotFoundError), match=error):
            trainer(tmp_path, max_steps=1).fit(module, datamodule=instructions(tmp_path))


def test_textdatamodules_tokenizer_goes_with_the_model(corpus, tmp_path):
    from lightning_adapm.data import TextDataModule

    data = TextDataModule(str(corpus), "*.txt", vocab_size=300, block_size=16, cache_dir=str(tmp_path / "cache"))
    callbacks = [LitGPTCheckpoint(str(tmp_path / "out"))]
    trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=callbacks).fit(LitGPTModule(config=CONFIG), data)
    check_valid_checkpoint_dir(tmp_path / "out", raise_error=True)
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["type"] == "BPE"
