"""LitGPTModule: which model it builds, what it optimizes and logs, and what it refuses."""

import math
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from finetuning import CONFIG as MODEL
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from trainers import quiet_trainer

from lightning_adapm.data import TextDataModule
from lightning_adapm.litgpt.module import LitGPTModule

CONFIG = {**MODEL, "padded_vocab_size": None, "padding_multiple": 64, "block_size": 16}


def data_module(corpus, tmp_path, **options):
    options = {"vocab_size": 300, "block_size": 16, "batch_size": 4, "val_fraction": 0.2} | options
    return TextDataModule(str(corpus), "*.txt", cache_dir=str(tmp_path / "cache"), **options)


def test_config_describes_the_whole_model():
    torch.manual_seed(0)
    module = LitGPTModule(config=CONFIG)
    assert module.model.config.padded_vocab_size == 320
    assert module.model.transformer.h[0].attn.qkv.weight.shape == (32 + 2 * 16, 32)
    # litgpt's initialization, not torch's (whose embeddings have a standard deviation of 1).
    assert module.model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert module(torch.zeros(2, 16, dtype=torch.int64)).shape == (2, 16, 320)


def test_name_with_fields_that_differ():
    module = LitGPTModule("pythia-14m", {"n_layer": 1, "vocab_size": 300, "padded_vocab_size": 320})
    assert module.model.config.name == "pythia-14m"
    assert module.model.config.n_embd == 128
    assert len(module.model.transformer.h) == 1


def test_tied_embeddings_are_one_parameter():
    free, tied = LitGPTModule(config=CONFIG), LitGPTModule(config=CONFIG, tie_embeddings=True)
    assert tied.model.lm_head.weight is tied.model.transformer.wte.weight
    assert free.model.lm_head.weight is not free.model.transformer.wte.weight
    assert sum(p.numel() for p in free.parameters()) - sum(p.numel() for p in tied.parameters()) == 320 * 32


def test_loss_is_the_next_tokens_cross_entropy():
    module = LitGPTModule(config=CONFIG)
    batch = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    log_probabilities = module(batch[:, :16]).log_softmax(-1)
    expected = -sum(log_probabilities[row, t, batch[row, t + 1]] for row in range(3) for t in range(16)) / 48
    module.log = lambda *args, **kwargs: None
    torch.testing.assert_close(module.training_step(batch, 0), expected)


def test_fit_learns_and_logs(corpus, tmp_path):
    """The words repeat, so a few steps must bring the loss far below that of guessing."""
    L.seed_everything(0)
    module = LitGPTModule(config=CONFIG, adapm={"lr": 1e-2})
    run = quiet_trainer(tmp_path, max_steps=60, val_check_interval=30, enable_checkpointing=False)
    run.fit(module, datamodule=data_module(corpus, tmp_path))
    assert {"train_loss", "val_loss", "val_ppl"} <= set(run.callback_metrics)
    metrics = run.validate(module, datamodule=data_module(corpus, tmp_path), verbose=False)[0]
    assert metrics["val_loss"] < 0.7 * math.log(300)
    assert metrics["val_ppl"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-4)


def test_validation_averages_over_windows(corpus, tmp_path):
    module = LitGPTModule(config=CONFIG)
    data = data_module(corpus, tmp_path, batch_size=3)
    logged = quiet_trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]["val_loss"]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(module(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            for batch in data.val_dataloader()
        ]
    assert len(losses) > 2
    assert logged == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    # The next mean starts anew: without an output layer every token is as likely as any other.
    torch.nn.init.zeros_(module.model.lm_head.weight)
    logged = quiet_trainer(tmp_path).validate(module, datamodule=data, verbose=False)[0]["val_loss"]
    assert logged == pytest.approx(math.log(320), rel=1e-5)


def test_checkpoint_rebuilds_the_module(corpus, tmp_path):
    settings = {"lr": 3e-3}
    module = LitGPTModule(config=CONFIG, tie_embeddings=True, adapm=settings)
    run = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(module, datamodule=data_module(corpus, tmp_path))
    run.save_checkpoint(tmp_path / "model.ckpt")
    again = LitGPTModule.load_from_checkpoint(tmp_path / "model.ckpt", map_location="cpu")
    assert again.adapm == settings
    assert again.model.lm_head.weight is again.model.transformer.wte.weight
    for name, weight in module.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_lr_find_puts_weights_and_data_back(corpus, tmp_path):
    module, data = LitGPTModule(config=CONFIG), data_module(corpus, tmp_path)
    before = module.model.lm_head.weight.detach().clone()
    run = quiet_trainer(tmp_path, max_steps=30, enable_checkpointing=False)
    Tuner(run).lr_find(module, datamodule=data, num_training=20)
    assert torch.equal(module.model.lm_head.weight, before)
    assert data.train_dataloader().position == 0


@pytest.mark.parametrize(
    ("option", "found"),
    [("vocab_size", 321), ("block_size", 17)],
)
def test_data_that_does_not_fit_is_refused(option, found):
    module = LitGPTModule(config=CONFIG)
    sizes = {"vocab_size": 320, "block_size": 16}
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(**sizes))
    module.setup("fit")
    module.trainer = SimpleNamespace(datamodule=SimpleNamespace(**sizes | {option: found}))
    with pytest.raises(MisconfigurationException, match=rf"data's `{option}` is {found}.*init_args.config.{option}"):
        module.setup("fit")


def test_a_model_that_is_not_described_is_refused():
    with pytest.raises(ValueError, match=r"`model_name`.*`config`"):
        LitGPTModule()
    with pytest.raises(ValueError, match=r"no field 'n_heads'; did you mean 'n_head'\?"):
        LitGPTModule(config=CONFIG | {"n_heads": 4})
    with pytest.raises(ValueError, match=r"no model_name 'pythia-15m'; did you mean .*pythia-1[46]"):
        LitGPTModule("pythia-15m")
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head.*, but n_embd is .*, n_head is 5"):
        LitGPTModule(config=CONFIG | {"n_head": 5})
    with pytest.raises(ValueError, match="but n_embd is 128, n_head is 14, n_query_groups is 2"):
        LitGPTModule("Qwen2.5-0.5B", config={"n_embd": 128})


def test_missing_litgpt_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "litgpt", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-adapm\[litgpt\]'"):
        LitGPTModule(config=CONFIG)


def test_a_capped_head_has_the_same_loss_in_chunks():
    """As Gemma 2's, whose cap litgpt applies to what the head returns."""
    torch.manual_seed(0)
    module = LitGPTModule(config={**CONFIG, "final_logit_softcapping": 0.1})
    tokens, found = torch.randint(300, (2, 17)), []
    for module.lm_head_chunk_size in (0, 5):
        loss, count = module._loss(tokens)
        found.append([loss.detach(), *torch.autograd.grad(loss, list(module.parameters()))])
        assert count == 32
    torch.testing.assert_close(*found)
    module.model.config.final_logit_softcapping = None
    assert not torch.isclose(module._loss(tokens)[0], found[0][0])
