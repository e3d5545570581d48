"""Callbacks that unfreeze while training, and add parameter groups of bare tensors."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from models import PlainLM, PlainTraining, tiny_gpt
from torch import nn
from trainers import quiet_trainer

from lightning_adapm import AdaPM, AdaPMMixin

fts = pytest.importorskip("finetuning_scheduler")

SCHEDULE = {0: {"params": ["net.lm_head.weight", "net.norm.*"]}, 1: {"params": ["net.layers.1.*"]}}


class Named(PlainTraining, L.LightningModule):
    """Hands over what is trainable at first, as the documentation of finetuning-scheduler does."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]))

    val_dataloader = PlainTraining.train_dataloader

    def configure_optimizers(self):
        optimizer = AdaPM(
            [(n, p) for n, p in self.named_parameters() if p.requires_grad], lr=1e-2, second_moment="block"
        )
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]


class All(AdaPMMixin, Named):
    adapm = {"lr": 1e-2, "schedule": "constant"}  # noqa: RUF012
    configure_optimizers = AdaPMMixin.configure_optimizers


def fit(tmp_path, module, callbacks, epochs=3):
    trainer = quiet_trainer(
        tmp_path, max_epochs=epochs, limit_train_batches=3, limit_val_batches=1, callbacks=callbacks
    )
    trainer.fit(module)
    (optimizer,) = trainer.optimizers
    return optimizer


def roles_of(optimizer):
    return {
        name: (role, optimizer.pieces[param])
        for group in optimizer.param_groups
        for name, role, param in zip(group["param_names"], group["roles"], group["params"], strict=True)
    }


@pytest.mark.parametrize("make", [Named, All])
def test_finetuning_scheduler(tmp_path, make):
    torch.manual_seed(0)
    module = make()
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    schedule = {depth: {**phase, "max_transition_epoch": depth + 1} for depth, phase in SCHEDULE.items()}
    scheduler = fts.FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True, restore_best=False)
    optimizer = fit(tmp_path, module, [scheduler, ModelCheckpoint(monitor="val_loss", save_top_k=-1)])
    moved = {name for name, param in module.named_parameters() if not torch.equal(param, before[name])}
    assert {"net.lm_head.weight", "net.layers.1.self_attn.q_proj.weight"} <= moved
    assert not any("layers.0" in name or "embed" in name for name in moved)
    plain = roles_of(AdaPM(module.named_parameters(), second_moment="block"))
    assert roles_of(optimizer).items() <= plain.items()
    late = optimizer.state[module.net.layers[1].self_attn.q_proj.weight]
    assert 0 < late["step"] < optimizer.state[module.net.lm_head.weight]["step"]


def test_lightnings_own_finetuning(tmp_path):
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, module):
            self.freeze(module.net.layers)

        def finetune_function(self, module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(module.net.layers[1], optimizer, lr=1e-3)

    class WithoutSchedule(Named):  # torch's schedulers count the groups that there were at first
        def configure_optimizers(self):
            return super().configure_optimizers()[0]

    module = WithoutSchedule()
    optimizer = fit(tmp_path, module, [Unfreeze()])
    plain = roles_of(AdaPM(module.named_parameters(), second_moment="block"))
    assert roles_of(optimizer).items() <= plain.items()
    assert "net.layers.1.self_attn.q_proj.weight" in roles_of(optimizer)
    assert optimizer.param_groups[-1]["lr"] == 1e-3


def test_bare_tensors_of_a_fused_weight_have_its_rows():
    model = tiny_gpt()
    optimizer = AdaPM([("lm_head.weight", model.lm_head.weight)])
    qkv = model.transformer.h[0].attn.qkv.weight
    optimizer.add_param_group({"params": [qkv]})
    assert [piece.role for piece in optimizer.pieces[qkv]] == ["query", "key", "value"]


def test_bare_tensors_of_another_model_have_its_roles_and_those_of_none_are_refused():
    one, other = PlainLM(), PlainLM()
    optimizer = AdaPM([("norm.weight", one.norm.weight)])
    optimizer.add_param_group({"params": [other.lm_head.weight, other.norm.weight]})
    assert optimizer.param_groups[1]["roles"] == ["lm_head", "norm"]
    assert optimizer.param_groups[1]["param_names"] == ["PlainLM.lm_head.weight", "PlainLM.norm.weight"]
    with pytest.raises(TypeError, match="without a name"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))]})
