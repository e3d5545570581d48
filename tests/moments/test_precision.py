"""Mixed and true half precision under a real Trainer, a gradient scaler included."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from models import PlainTraining
from torch import nn
from trainers import quiet_trainer

from lightning_adapm import AdaPM, LoRAPre


class Module(PlainTraining, L.LightningModule):
    def __init__(self, make=AdaPM):
        torch.manual_seed(0)  # before weights are drawn
        super().__init__()
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters(), lr=1e-2, rank=2, **({"update_proj_gap": 3} if self.make is AdaPM else {}))


class Watch(Callback):
    """After every batch: weights, the steps that the optimizer has counted, and its state."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, *args):
        (optimizer,) = trainer.optimizers
        state = optimizer.state[module.net.lm_head.weight]
        flat = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
        step = float(state["step"]) if state else 0.0
        self.seen.append((flat, step, trainer.precision_plugin.state_dict().get("scale")))


def fit(tmp_path, module, steps=10, callbacks=(), **options):
    options |= {"limit_train_batches": steps, "callbacks": list(callbacks)}
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False, **options)
    trainer.fit(module)
    return trainer


@pytest.mark.parametrize("make", [AdaPM, LoRAPre])
def test_steps_that_a_gradient_scaler_skips_change_nothing(tmp_path, make):
    watch = Watch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
    fit(tmp_path, Module(make), 10, [watch], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    steps = [step for _, step, _ in watch.seen]
    skipped = steps.count(0.0)
    assert 2 <= skipped <= 8, steps
    assert steps[skipped:] == [float(k + 1) for k in range(10 - skipped)]  # skipped steps are not counted
    for (before, _, _), (after, _, _) in zip(watch.seen[: skipped - 1], watch.seen[1:skipped], strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(watch.seen[skipped - 1][0], watch.seen[skipped][0])
    assert watch.seen[-1][2] == 2.0 ** (24 - skipped)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_keeps_exact_second_moments(tmp_path, precision):
    module = Module()
    trainer = fit(tmp_path, module, precision=precision)
    (optimizer,) = trainer.optimizers
    weight = module.net.lm_head.weight
    assert weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32
    assert all(param.isfinite().all() for param in module.parameters())
