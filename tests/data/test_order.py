"""The order of batches is exactly reproducible: on any number of processes, after a resume, under the Trainer."""

from itertools import islice
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from data_modules import data_module, ready
from lightning.pytorch.callbacks import ModelCheckpoint
from trainers import quiet_trainer

from lightning_adapm.data import TrainLoader, ValLoader

TOKENS = np.arange(1000, dtype=np.uint16)


class Recorder(L.LightningModule):
    """Learns nothing; remembers every batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.tolist())
        return self.weight * 0.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, ckpt_path=None, callbacks=(), **options):
    recorder = Recorder()
    trainer = quiet_trainer(folder, callbacks=list(callbacks), enable_checkpointing=bool(callbacks), **options)
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path)
    return recorder.seen


def test_order_is_a_function_of_seed_and_position():
    one = TrainLoader(TOKENS, 10, 4, seed=3)
    batches = [batch.tolist() for _ in range(2) for batch in one]
    assert len(one) == 24
    assert len(batches) == 48
    starts = [row[0] for batch in batches for row in batch]
    first, second = starts[:96], starts[96:]
    assert len(set(first)) == len(set(second)) == 96
    assert first != second
    assert all(row == list(range(row[0], row[0] + 11)) for batch in batches for row in batch)
    torch.manual_seed(1)  # others' random states have no say
    np.random.seed(1)
    again = TrainLoader(TOKENS, 10, 4, seed=3)
    assert [batch.tolist() for _ in range(2) for batch in again] == batches
    assert next(iter(TrainLoader(TOKENS, 10, 4, seed=4))).tolist() != batches[0]


@pytest.mark.parametrize("stop", [0, 5, 24, 30])
def test_loader_state_continues_with_the_next_batch(stop):
    whole = TrainLoader(TOKENS, 10, 4)
    expected = [batch.tolist() for _ in range(3) for batch in whole]
    first, seen = TrainLoader(TOKENS, 10, 4), []
    while len(seen) < stop:
        for batch in first:
            seen.append(batch.tolist())
            if len(seen) == stop:
                break
    second = TrainLoader(TOKENS, 10, 4)
    second.load_state_dict(first.state_dict())
    seen += [batch.tolist() for batch in second]
    assert seen == expected[: len(seen)]
    assert len(seen) == stop + 24


def test_state_of_another_order_starts_over_with_a_warning():
    saved = TrainLoader(TOKENS, 10, 4, seed=1)
    next(iter(saved))
    other = TrainLoader(TOKENS, 10, 4, seed=2)
    with pytest.warns(UserWarning, match="data order"):
        other.load_state_dict(saved.state_dict())
    assert other.position == 0


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("loader", [TrainLoader, ValLoader])
def test_global_batch_is_the_same_on_any_number_of_processes(loader, world_size):
    alone = list(loader(TOKENS, 10, 8))
    shares = [list(loader(TOKENS, 10, 8, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len(alone) == 12
    for batch, *parts in zip(alone, *shares, strict=True):
        assert {len(part) for part in parts} == {8 // world_size}
        assert torch.equal(torch.cat(parts), batch)


def test_data_module_asks_the_strategy_for_its_share(corpus, tmp_path):
    alone = next(iter(ready(corpus, tmp_path).train_dataloader()))

    data = data_module(corpus, tmp_path)
    data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1})
    data.setup("fit")
    assert torch.equal(next(iter(data.train_dataloader())), alone[2:])
    assert len(next(iter(data.val_dataloader()))) == 2


def test_validation_windows_are_fixed_and_limited():
    loader = ValLoader(TOKENS, 10, 4, batches=3)
    first, second = ([batch.tolist() for batch in loader] for _ in range(2))
    assert first == second
    assert len(first) == len(loader) == 3
    assert [row[0] for batch in first for row in batch] == list(range(0, 120, 10))
    # Less text than a batch makes one smaller batch.
    assert [len(batch) for batch in ValLoader(TOKENS[:35], 10, 8)] == [3]
    assert [len(batch) for batch in ValLoader(TOKENS[:35], 10, 8, rank=1, world_size=2)] == [1]


def test_fingerprint_tells_data_and_orders_apart(corpus, tmp_path):
    assert data_module(corpus, tmp_path).fingerprint is None
    same, again = (ready(corpus, tmp_path / name).fingerprint for name in "ab")
    assert same == again
    others = [{"seed": 1}, {"batch_size": 2}, {"block_size": 4}, {"val_batches": 1}, {"vocab_size": 301}]
    assert len({same, *(ready(corpus, tmp_path, **other).fingerprint for other in others)}) == 6


STEPS = 24  # three epochs of 8 batches


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return fit(ready(corpus, folder), folder, max_steps=STEPS, max_epochs=-1, limit_train_batches=8)


def test_epochs_cut_short_go_on_through_the_data(uninterrupted, corpus, tmp_path):
    loader = ready(corpus, tmp_path).train_dataloader()
    assert len(loader) > STEPS
    assert uninterrupted == [batch.tolist() for batch in islice(loader, STEPS)]


@pytest.mark.parametrize("limit", [{"max_steps": STEPS, "max_epochs": -1}, {"max_epochs": 3}], ids=["steps", "epochs"])
@pytest.mark.parametrize("saved", [3, 8, 11, 16, "epoch_end", "validation_end"])
def test_resume_continues_with_exactly_the_next_batch(uninterrupted, corpus, tmp_path, saved, limit):
    """Checkpoints in the middle and at the last step of an epoch, at its end, and after a validation inside it."""
    when = {
        "epoch_end": {"every_n_epochs": 1, "save_on_train_epoch_end": True, "filename": "at"},
        "validation_end": {"every_n_epochs": 1, "save_on_train_epoch_end": False, "filename": "at"},
    }.get(saved, {"every_n_train_steps": saved, "filename": "at"})
    checkpoint = ModelCheckpoint(tmp_path / "checkpoints", save_top_k=1, **when)
    steps = saved if isinstance(saved, int) else 8
    options = {"limit_train_batches": 8, "val_check_interval": 4}
    before = fit(ready(corpus, tmp_path), tmp_path, callbacks=[checkpoint], max_steps=steps, **options)
    assert before == uninterrupted[:steps]
    after = fit(ready(corpus, tmp_path), tmp_path, ckpt_path=checkpoint.best_model_path, **options, **limit)
    assert before + after == uninterrupted


def test_a_second_fit_starts_at_the_first_batch(corpus, tmp_path, uninterrupted):
    data = ready(corpus, tmp_path)
    for _ in range(2):
        assert fit(data, tmp_path, max_steps=3) == uninterrupted[:3]


def test_reloaded_dataloaders_do_not_start_over(corpus, tmp_path, uninterrupted):
    data = ready(corpus, tmp_path)
    seen = fit(data, tmp_path, max_epochs=2, limit_train_batches=8, reload_dataloaders_every_n_epochs=1)
    assert seen == uninterrupted[:16]
