"""Callbacks and habits that change rates, accumulation, batches and settings while the Trainer trains."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from models import PlainLM, token_batches
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_adapm import AdaPM, AdaPMMixin
from lightning_adapm.trainer.schedule import lr_factor

EPOCHS, BATCHES = 3, 4


class Rates(L.Callback):
    """Records the learning rate of every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = PlainLM(vocab=61, width=16, n_head=2, n_query_groups=1)

    def training_step(self, batch, batch_idx):
        return self.net(batch)

    def train_dataloader(self):
        return DataLoader(torch.cat(token_batches(BATCHES)), batch_size=4)


class Mixed(AdaPMMixin, Tiny):
    adapm = {"lr": 1e-2, "rank": 2, "update_proj_gap": 3}  # noqa: RUF012


def fit(tmp_path, module, *callbacks, ckpt_path=None, **options):
    """A quiet run on the CPU; its Trainer."""
    limits = {"max_epochs": EPOCHS, "enable_checkpointing": False}
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **(limits | options))
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def cosine(steps, lr=1e-2, warmup=0):
    return [lr * lr_factor(step, warmup=warmup, total=steps, min_ratio=0.1) for step in range(steps)]


class Accumulate(L.Callback):
    """Accumulates in a way of its own, which no schedule can know of."""

    def __init__(self, start):
        self.start = start

    def on_train_epoch_start(self, trainer, module):
        trainer.accumulate_grad_batches = 2 if trainer.current_epoch >= self.start else 1


class TestNumberOfSteps:
    def test_of_an_accumulation_schedule(self, tmp_path, recwarn):
        rates = Rates()
        fit(tmp_path, Mixed(), GradientAccumulationScheduler({0: 1, 1: 3}), rates)
        assert rates.seen == pytest.approx(cosine(4 + 2 + 2))
        assert not [w for w in recwarn if "schedule" in str(w.message)]

    def test_of_an_accumulation_schedule_ended_by_steps(self, tmp_path):
        rates = Rates()
        fit(tmp_path, Mixed(), GradientAccumulationScheduler({0: 1, 1: 3}), rates, max_steps=5)
        assert rates.seen == pytest.approx(cosine(5))

    def test_of_accumulation_that_a_callback_sets_before_the_first(self, tmp_path):
        rates = Rates()
        fit(tmp_path, Mixed(), Accumulate(0), rates)
        assert rates.seen == pytest.approx(cosine(6))

    def test_changed_while_training_is_one_warning(self, tmp_path):
        rates = Rates()
        with pytest.warns(UserWarning, match="has 12 steps, but the run now takes another number") as caught:
            fit(tmp_path, Mixed(), Accumulate(1), rates)
        assert rates.seen == pytest.approx(cosine(12)[:8])
        assert sum("another number" in str(w.message) for w in caught) == 1

    def test_after_a_batch_size_was_found(self, tmp_path, recwarn):
        class Sized(Mixed):
            adapm = Mixed.adapm | {"warmup_steps": 0.25}
            batch_size = 1

            def train_dataloader(self):
                return DataLoader(torch.cat(token_batches(BATCHES)), batch_size=self.batch_size)

        rates = Rates()
        fit(tmp_path, Sized(), BatchSizeFinder(max_trials=2, steps_per_trial=1), rates)
        assert len(rates.seen) == 12  # of 4 sequences each, not 48 of one
        assert rates.seen[1:] == pytest.approx(cosine(12, warmup=3)[1:])
        assert not [w for w in recwarn if "another number" in str(w.message)]

    @pytest.mark.parametrize("none", [{"limit_train_batches": 0}, {"max_epochs": 0}, {"max_steps": 0}])
    def test_of_a_run_without_any(self, tmp_path, none):
        trainer = fit(tmp_path, Mixed(), **none)
        assert trainer.global_step == 0
        assert not trainer.optimizers[0].state


class TestLearningRateFound:
    def found(self, tmp_path, **settings):
        module, rates = Mixed(), Rates()
        module.adapm = Mixed.adapm | settings
        fit(tmp_path, module, LearningRateFinder(1e-4, 1e-1, num_training_steps=14), rates, max_steps=16, max_epochs=9)
        assert module.lr != 1e-2
        return module.lr, rates.seen

    @pytest.mark.parametrize("warmup", [0, 3])
    def test_by_a_callback_holds_to_the_end(self, tmp_path, warmup):
        lr, rates = self.found(tmp_path, warmup_steps=warmup)
        assert rates == pytest.approx(cosine(16, lr, warmup))

    def test_without_a_schedule(self, tmp_path):
        lr, rates = self.found(tmp_path, schedule="constant")
        assert rates == [lr] * 16

    def test_assigned_beside_adapm(self, tmp_path):
        module = Mixed()
        module.lr = 2e-2
        with pytest.warns(UserWarning, match=r"lr=0.02, assigned to Mixed.lr, is used instead of adapm's lr=0.01"):
            trainer = fit(tmp_path, module, max_steps=1)
        assert trainer.optimizers[0].param_groups[0]["initial_lr"] == 2e-2


class TestGroupsThatJoinTheSchedule:
    def test_at_the_rate_that_they_come_with(self, tmp_path):
        class Late(Mixed):
            def configure_optimizers(self):
                return self.schedule(AdaPM([("net.lm_head.weight", self.net.lm_head.weight)], lr=self.lr))

            def on_train_epoch_start(self):
                if self.current_epoch == 1:
                    now = self.optimizers().param_groups[0]["lr"]
                    self.optimizers().add_param_group(
                        {"params": [("net.norm.weight", self.net.norm.weight)], "lr": now / 10}
                    )

        first, added = fit(tmp_path, Late()).optimizers[0].param_groups
        assert added["lr"] == pytest.approx(first["lr"] / 10)
        assert first["lr"] == pytest.approx(1e-3)


class LeavesOut(Mixed):
    """Leaves the second batch of every epoch out, in one of two ways."""

    way = ""

    def training_step(self, batch, batch_idx):
        self.batch_idx = batch_idx
        loss = super().training_step(batch, batch_idx)
        return None if self.way == "skipped" and batch_idx == 1 else loss

    def on_before_optimizer_step(self, optimizer):
        if self.way == "canceled" and self.batch_idx == 1:
            optimizer.zero_grad()


@pytest.mark.parametrize("way", ["skipped", "canceled"])
def test_steps_that_are_left_out_say_nothing(tmp_path, way, recwarn):
    module = LeavesOut()
    module.way = way
    optimizer = fit(tmp_path, module).optimizers[0]
    assert {int(state["step"]) for state in optimizer.state.values()} == {EPOCHS * (BATCHES - 1)}
    assert not [w for w in recwarn if "no gradient" in str(w.message)]


class WritesSettings(L.Callback):
    """A schedule of rate and decay by hand."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-2 / (1 + trainer.global_step), 0.1 * trainer.global_step


class Cancels(L.Callback):
    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step % 3 == 1:
            optimizer.zero_grad()


def one_cycle(optimizer):
    return {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=12), "interval": "step"}


def cyclic(optimizer):
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 1e-3, 1e-2, step_size_up=3, base_momentum=0.7)
    return {"scheduler": schedule, "interval": "step"}


def plateau(optimizer):
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
    return {"scheduler": schedule, "monitor": "loss"}


@pytest.mark.parametrize(
    ("callbacks", "schedule"),
    [
        (lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)], None),
        (lambda: [EMAWeightAveraging(decay=0.5)], None),
        (lambda: [ModelPruning("l1_unstructured", amount=0.2)], None),
        (lambda: [ModelPruning("l1_unstructured", amount=0.2, use_lottery_ticket_hypothesis=False)], None),
        (lambda: [GradientAccumulationScheduler({0: 1, 1: 3})], None),
        (lambda: [WritesSettings()], None),
        (lambda: [Cancels()], None),
        (list, one_cycle),
        (list, cyclic),
        (list, plateau),
    ],
    ids=["SWA", "EMA", "lottery", "pruning", "accumulation", "written", "canceled", "one cycle", "cyclic", "plateau"],
)
def test_as_with_torch_adamw(tmp_path, callbacks, schedule):
    """With full momentum everywhere AdaPM is AdamW, also in whatever callbacks make of a run."""

    class Trained(Tiny):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = self.make(self.parameters(), lr=1e-2)
            return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule(optimizer)}

    runs = []
    for make in (torch.optim.AdamW, partial(AdaPM, momentum="full", clip_threshold=None)):
        module = Trained()
        module.make = make
        fit(tmp_path, module, *callbacks())
        runs.append(module)
    for p, q in zip(*(module.state_dict().values() for module in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
