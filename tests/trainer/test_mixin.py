"""The LightningModule mixin: settings, schedule, learning-rate finder, what it refuses."""

import inspect
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceXLAStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import PlainTraining, token_batches
from trainers import quiet_trainer

from lightning_adapm import AdaPM, AdaPMConfig, AdaPMMixin, PartialMuon, PartialMuonConfig, explain
from lightning_adapm.data import TrainLoader
from lightning_adapm.trainer.mixin import check_strategy
from lightning_adapm.trainer.schedule import lr_factor


class Module(AdaPMMixin, PlainTraining, L.LightningModule):
    pass


def trainer(tmp_path, **options):
    return quiet_trainer(tmp_path, **({"max_steps": 8} | options))


@pytest.mark.parametrize(("make", "config"), [(AdaPM, AdaPMConfig), (PartialMuon, PartialMuonConfig)])
def test_config_is_the_optimizers_signature(make, config):
    assert config.make is make
    signature = inspect.signature(make).parameters
    config = {
        key: value for key, value in vars(config()).items() if key not in ("warmup_steps", "schedule", "min_lr_ratio")
    }
    named = [p for p in signature.values() if p.name != "params" and p.kind is not p.VAR_KEYWORD]
    assert config == {p.name: p.default for p in named}


@pytest.mark.parametrize(
    "settings", [{"lr": 2e-3, "rank": 3, "warmup_steps": 2}, AdaPMConfig(lr=2e-3, rank=3, warmup_steps=2)]
)
def test_settings_reach_the_optimizer(tmp_path, settings):
    module = Module()
    module.adapm = settings
    fit = trainer(tmp_path)
    fit.fit(module)
    (optimizer,) = fit.optimizers
    assert isinstance(optimizer, AdaPM)
    assert optimizer.defaults["rank"] == 3
    assert optimizer.param_groups[0]["initial_lr"] == 2e-3
    assert "query" in optimizer.param_groups[0]["roles"]


@pytest.mark.parametrize("settings", [{"optimizer": "partial_muon", "mu": 0.9, "rank": 3}, PartialMuonConfig(mu=0.9)])
def test_settings_name_the_optimizer(tmp_path, settings):
    module = Module()
    module.adapm = settings
    fit = trainer(tmp_path)
    fit.fit(module)
    assert type(fit.optimizers[0]) is PartialMuon
    assert fit.optimizers[0].defaults["mu"] == 0.9
    assert explain(module).total == explain(fit.optimizers[0]).total


def test_null_on_the_command_line_arrives_as_text():
    config = AdaPMConfig.resolve({"clip_threshold": "None", "state_dtype": "None", "rank": 3})
    assert (config.clip_threshold, config.state_dtype, config.rank) == (None, None, 3)


def test_defaults_without_the_attribute(tmp_path):
    fit = trainer(tmp_path)
    fit.fit(Module())
    assert fit.optimizers[0].defaults["rank"] == AdaPMConfig().rank


def test_the_schedule_warms_up_and_falls_as_a_cosine(tmp_path):
    rates = []

    class Recorder(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = Module()
    module.adapm = {"lr": 1.0, "warmup_steps": 2, "min_lr_ratio": 0.1}
    trainer(tmp_path, callbacks=[Recorder()]).fit(module)
    wanted = [1 / 3, 2 / 3] + [0.1 + 0.45 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    assert rates == pytest.approx(wanted)


def test_factor_ends_at_the_minimum():
    assert lr_factor(100, warmup=10, total=100, min_ratio=0.2) == pytest.approx(0.2)
    assert lr_factor(10**6, warmup=10, total=100, min_ratio=0.2) == pytest.approx(0.2)
    assert lr_factor(50, warmup=0, total=None, min_ratio=0.2) == 1.0


def test_any_optimizer_takes_the_schedule(tmp_path):
    class WithAdamW(Module):
        def configure_optimizers(self):
            return self.schedule(torch.optim.AdamW(self.parameters(), lr=1e-3))

    fit = trainer(tmp_path)
    fit.fit(WithAdamW())
    assert isinstance(fit.optimizers[0], torch.optim.AdamW)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_an_endless_run_needs_a_constant_schedule(tmp_path):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 3

    endless = {"max_steps": -1, "max_epochs": -1, "callbacks": [Stop()]}
    with pytest.raises(MisconfigurationException, match="max_steps"):
        trainer(tmp_path, **endless).fit(Module())
    module = Module()
    module.adapm = {"schedule": "constant", "warmup_steps": 2}
    fit = trainer(tmp_path, **endless)
    fit.fit(module)
    assert fit.global_step >= 3


def test_lr_find_works_and_takes_effect(tmp_path):
    module = Module()
    fit = trainer(tmp_path)
    found = Tuner(fit).lr_find(module, num_training=20, min_lr=1e-5, max_lr=1e-1)
    assert module.lr == found.suggestion() != AdaPMConfig().lr
    fit.fit(module)
    assert fit.optimizers[0].param_groups[0]["initial_lr"] == pytest.approx(found.suggestion())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"rnk": 3}, ValueError, "no option 'rnk'; did you mean 'rank'"),
        ({"optimizer": "muon"}, ValueError, "optimizer 'muon'; write one of adapm, partial_muon"),
        ({"optimizer": "partial_muon", "debias": True}, ValueError, "no option 'debias'"),
        ({"optimizer": "partial_muon", "mu": 2}, ValueError, "mu must be"),
        ({"rank": 0}, ValueError, "rank must be"),
        ({"lr": "1e-3"}, ValueError, "lr must be a number"),
        ({"schedule": "linear"}, ValueError, "schedule must be one of cosine, constant"),
        ({"warmup_steps": 1.5}, ValueError, "warmup_steps must be"),
        ({"min_lr_ratio": 2}, ValueError, "min_lr_ratio must be"),
        (3, TypeError, "adapm must be a dict or an AdaPMConfig"),
    ],
)
def test_wrong_settings(settings, error, words):
    with pytest.raises(error, match=words):
        AdaPMConfig.resolve(settings)


def test_wrong_order_of_bases():
    with pytest.raises(TypeError, match=r"write class Wrong\(AdaPMMixin"):
        type("Wrong", (L.LightningModule, AdaPMMixin), {})


def test_strategies_that_replace_parameters_or_the_step_are_refused():
    with pytest.raises(MisconfigurationException, match="SingleDeviceXLAStrategy.*DDP"):
        check_strategy(SingleDeviceXLAStrategy.__new__(SingleDeviceXLAStrategy))
    check_strategy(FSDPStrategy())


@pytest.mark.parametrize("saved_at", [5, 6])  # the step after 5 refreshes, the one after 6 does not
def test_resume_through_the_trainer_is_bit_identical(tmp_path, saved_at):
    class Resumable(Module):
        def training_step(self, batch, batch_idx):
            return self.net(batch)

        def train_dataloader(self):
            return TrainLoader(torch.cat(token_batches(60)).flatten().numpy(), block_size=16, batch_size=4)

    def run(name, **options):
        torch.manual_seed(0)
        module = Resumable()
        module.adapm = {"lr": 3e-3, "update_proj_gap": 5, "warmup_steps": 2, "rank": 2}
        fit = trainer(tmp_path / name, **options)
        return fit, module

    fit, whole = run("whole")
    fit.fit(whole)
    checkpoint = L.pytorch.callbacks.ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=saved_at, save_top_k=-1
    )
    fit, first = run("first", callbacks=[checkpoint])
    fit.fit(first)
    fit, second = run("second")
    fit.fit(second, ckpt_path=tmp_path / f"step={saved_at}.ckpt", weights_only=True)
    assert fit.global_step == 8
    for (name, p), q in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(p, q[1]), name
