"""Runs that are resumed after callbacks have changed the optimizer: bit by bit the uninterrupted ones."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, ModelCheckpoint
from models import PlainLM, token_batches
from torch.utils.data import DataLoader
from trainers import quiet_trainer

from lightning_adapm import AdaPM, AdaPMMixin

EPOCHS = 4


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = PlainLM(vocab=61, width=16, n_head=2, n_query_groups=1)
        self.backbone = self.net.layers  # as BackboneFinetuning calls it

    def training_step(self, batch, batch_idx):
        loss = self.net(batch)
        self.log("loss", loss)
        return loss

    def train_dataloader(self):
        return DataLoader(torch.cat(token_batches(3)), batch_size=4)


class HandingOver:
    """Ways in which projects that finetune hand parameters over, and their schedules."""

    class Trainable(Tiny):
        def configure_optimizers(self):
            trainable = [(name, param) for name, param in self.named_parameters() if param.requires_grad]
            return AdaPM(trainable, lr=1e-2, rank=2, update_proj_gap=2)

    class Bare(Tiny):
        def configure_optimizers(self):
            return AdaPM(filter(lambda param: param.requires_grad, self.parameters()), lr=1e-2, rank=2)

    class Scheduled(AdaPMMixin, Trainable):
        adapm = {"lr": 1e-2, "warmup_steps": 2}  # noqa: RUF012

        def configure_optimizers(self):
            return self.schedule(HandingOver.Trainable.configure_optimizers(self))


class Unfreeze(BaseFinetuning):
    """Unfreezes again what a resumed run has frozen at its start, which Lightning leaves to the callback."""

    def freeze_before_training(self, module):
        self.freeze(module.net.layers)
        self.freeze(module.net.embed_tokens)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net.layers[1], optimizer, lr=1e-3)
        if epoch == 2:
            self.make_trainable(module.net.layers[1])
            self.unfreeze_and_add_param_group([module.net.layers[0], module.net.embed_tokens], optimizer)
        if epoch > 2:
            self.make_trainable(module)


class UnfreezeBackbone(BackboneFinetuning):
    """Likewise."""

    def __init__(self):
        super().__init__(unfreeze_backbone_at_epoch=2)

    def finetune_function(self, module, epoch, optimizer):
        super().finetune_function(module, epoch, optimizer)
        if epoch > 2:
            self.make_trainable(module.backbone)


def run(folder, make, callback, ckpt_path=None, saver=ModelCheckpoint):
    """Train, with a checkpoint at the end of every epoch; the module and the optimizer."""
    module = make()
    saver = saver(folder, filename="{epoch}", monitor="loss", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = quiet_trainer(folder, max_epochs=EPOCHS, callbacks=[callback(), saver])
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=False)
    return module, trainer.optimizers[0]


def same(one, other):
    """Parameters, and the optimizers' state by parameter."""
    for p, q in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(p, q)
        mine, theirs = one[1].state[p], other[1].state[q]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine)
    assert [group["roles"] for group in one[1].param_groups] == [group["roles"] for group in other[1].param_groups]
    assert [group["lr"] for group in one[1].param_groups] == [group["lr"] for group in other[1].param_groups]


@pytest.mark.parametrize(
    ("make", "callback", "epochs"),
    [
        (HandingOver.Trainable, Unfreeze, (0, 1, 2)),  # before the first group was added, after it, after the last
        (HandingOver.Bare, UnfreezeBackbone, (1, 2)),
        (HandingOver.Scheduled, Unfreeze, (2,)),
    ],
)
def test_after_groups_were_added(tmp_path, make, callback, epochs):
    whole = run(tmp_path, make, callback)
    assert len(whole[1].param_groups) > 1
    for epoch in epochs:
        same(run(tmp_path, make, callback, tmp_path / f"epoch={epoch}.ckpt"), whole)


def test_of_a_finetuning_scheduler(tmp_path):
    """Inside a phase: where it resumes at the end of one, it begins the next an epoch late, with any optimizer."""
    fts = pytest.importorskip("finetuning_scheduler")

    def schedule():
        phases = {
            0: {"params": ["net.lm_head.weight", "net.norm.*"], "max_transition_epoch": 1},
            1: {"params": ["net.layers.1.*"], "max_transition_epoch": 4},
        }
        return fts.FinetuningScheduler(ft_schedule=phases, epoch_transitions_only=True, restore_best=False)

    class Named(HandingOver.Trainable):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]

    whole = run(tmp_path, Named, schedule, saver=fts.FTSCheckpoint)
    assert len(whole[1].param_groups) == 2
    same(run(tmp_path, Named, schedule, tmp_path / "epoch=1.ckpt", fts.FTSCheckpoint), whole)
