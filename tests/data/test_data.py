"""TextDataModule: what is read, how it is split and cached, and that the order of batches is exactly reproducible."""

import os
import sys
from itertools import islice
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from texts import write_corpus
from trainers import quiet_trainer

from lightning_adapm.data import TextDataModule, TrainLoader, ValLoader, tokens
from lightning_adapm.data.corpus import find_corpus

TOKENS = np.arange(1000, dtype=np.uint16)


def module(corpus, tmp_path, **options):
    options = {"vocab_size": 300, "block_size": 8, "batch_size": 4, "val_fraction": 0.2} | options
    return TextDataModule(str(corpus), "*.txt", cache_dir=str(tmp_path / "cache"), **options)


def ready(corpus, tmp_path, **options):
    data = module(corpus, tmp_path, **options)
    data.prepare_data()
    data.setup("fit")
    return data


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


# What is read


def test_documents_are_split_by_file(tmp_path):
    folder = write_corpus(tmp_path / "text", files=40)
    found = find_corpus(folder, "*.txt", None, 0.25, None)
    train, val = ({doc.name for doc in part} for part in (found.train, found.val))
    assert not train & val
    assert train | val == {path.name for path in folder.iterdir()}
    assert 4 <= len(val) <= 16
    # A file keeps its side when others come.
    (folder / "new.txt").write_text("new\n")
    again = find_corpus(folder, "*.txt", None, 0.25, None)
    assert {doc.name for doc in again.train} - {"new.txt"} == train
    assert again.digest() != found.digest()


@pytest.mark.parametrize("val_fraction", [0.001, 0.999])
def test_neither_side_is_empty(tmp_path, val_fraction):
    found = find_corpus(write_corpus(tmp_path, files=3), "*.txt", None, val_fraction, None)
    assert found.train
    assert found.val


def test_one_file_is_cut_at_the_end_of_a_line(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("".join(f"line {i} äöü\n" for i in range(1000)), encoding="utf-8")
    found = find_corpus(path, "*", None, 0.1, 8000)
    (train,), (val,) = (list(found.texts(part)) for part in ("train", "val"))
    assert path.read_text(encoding="utf-8").startswith(train + val)
    assert train.endswith("\n")
    assert val.endswith("\n")
    assert len(val.encode()) == pytest.approx(800, abs=30)
    assert len((train + val).encode()) == pytest.approx(8000, abs=30)


def test_max_bytes_excluded_folders_and_bytes_that_are_no_text(tmp_path):
    folder = write_corpus(tmp_path / "text", files=8)
    write_corpus(folder / "skipped" / "deep", files=2)
    (folder / "image.txt").write_bytes(b"\xff\xfe\x00 no utf-8")
    (folder / "empty.txt").touch()
    found = find_corpus(folder, "*.txt", ["skipped"], 0.2, None)
    documents = found.train + found.val
    assert {doc.name for doc in documents} == {path.name for path in folder.glob("*.txt")} - {"empty.txt"}
    assert sum(len(list(found.texts(part))) for part in ("train", "val")) == len(documents) - 1

    few = find_corpus(folder, "*.txt", ["skipped"], 0.2, 7000)
    total = sum(doc.size for doc in few.train + few.val)
    assert 3500 < total <= 7000


def test_standard_library_is_the_default(tmp_path):
    found = find_corpus(None, "*.py", None, 0.05, None)
    names = {doc.name for doc in found.train + found.val}
    assert {"os.py", "json/decoder.py"} <= names
    assert not [name for name in names if name.startswith(("site-packages/", "test/", "encodings/"))]


def test_tokens_decode_to_the_documents(corpus, tmp_path):
    data = ready(corpus, tmp_path)
    end = data.tokenizer.token_to_id("<|endoftext|>")
    ids = np.load(next((tmp_path / "cache").glob("*/val.npy")))
    assert ids.dtype == np.uint16
    pieces = np.split(ids, np.flatnonzero(ids == end) + 1)[:-1]
    decoded = [data.tokenizer.decode(piece[:-1].tolist()) for piece in pieces]
    assert decoded == list(find_corpus(corpus, "*.txt", None, 0.2, None).texts("val"))
    assert data.vocab_size == data.tokenizer.get_vocab_size() <= 300


# The cache


def test_cache_is_reused_until_a_file_or_a_setting_changes(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "text")
    trained = []
    original = tokens.train_tokenizer
    monkeypatch.setattr(tokens, "train_tokenizer", lambda *args: trained.append(args) or original(*args))
    first = [batch.tolist() for batch in ready(folder, tmp_path).train_dataloader()]
    assert len(trained) == 1
    assert [batch.tolist() for batch in ready(folder, tmp_path).train_dataloader()] == first
    assert len(trained) == 1
    ready(folder, tmp_path, vocab_size=310)
    assert len(trained) == 2
    (folder / "document_3.txt").write_text("another text\n" * 20)
    ready(folder, tmp_path)
    assert len(trained) == 3
    # A change that keeps the size shows in the modification time.
    os.utime(folder / "document_3.txt", (1, 1))
    ready(folder, tmp_path)
    assert len(trained) == 4


def test_two_builds_give_the_same_tokens(corpus, tmp_path):
    found = find_corpus(corpus, "*.txt", None, 0.2, None)
    one, other = (tokens.build_cache(found, 300, tmp_path / name) for name in "ab")
    assert sorted(path.name for path in one.iterdir()) == ["tokenizer.json", "train.npy", "val.npy"]
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def test_a_build_that_dies_leaves_no_cache(corpus, tmp_path, monkeypatch):
    data = module(corpus, tmp_path)
    with monkeypatch.context() as patch:

        def dies(path, array):
            path.write_bytes(b"half")
            raise KeyboardInterrupt

        patch.setattr(np, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            data.prepare_data()
    assert list((tmp_path / "cache").iterdir()) == []
    # What a process leaves that had no chance to clean up is not taken for a cache either, and goes after a day.
    old = tmp_path / "cache" / "partial-old"
    old.mkdir()
    os.utime(old, (0, 0))
    data.prepare_data()
    data.setup("fit")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_slower_of_two_builders_takes_the_faster_ones_cache(corpus, tmp_path, monkeypatch):
    found = find_corpus(corpus, "*.txt", None, 0.2, None)
    save, raced = np.save, []

    def save_after_another_process(path, array):
        if not raced:
            raced.append(True)
            raced.append(tokens.build_cache(found, 300, tmp_path))
        save(path, array)

    monkeypatch.setattr(np, "save", save_after_another_process)
    assert tokens.build_cache(found, 300, tmp_path) == raced[1]
    assert [path.name for path in tmp_path.iterdir()] == [raced[1].name]


# The order


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

    data = module(corpus, tmp_path)
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
    assert module(corpus, tmp_path).fingerprint is None
    same, again = (ready(corpus, tmp_path / name).fingerprint for name in "ab")
    assert same == again
    others = [{"seed": 1}, {"batch_size": 2}, {"block_size": 4}, {"val_batches": 1}, {"vocab_size": 301}]
    assert len({same, *(ready(corpus, tmp_path, **other).fingerprint for other in others)}) == 6


# Under the Trainer

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


# Bad input


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("vocab_size", 256),
        ("max_bytes", 0),
        ("block_size", 0),
        ("batch_size", 0),
        ("val_batches", 0),
        ("seed", -1),
    ],
)
def test_an_option_out_of_range_is_named(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must .* but got {value}"):
        TextDataModule(**{option: value})


def test_missing_text_is_named(tmp_path):
    def prepare(path, pattern="*.txt", **options):
        TextDataModule(str(path), pattern, cache_dir=str(tmp_path / "cache"), **options).prepare_data()

    with pytest.raises(ValueError, match=r"`path`: there is no .*nowhere"):
        prepare(tmp_path / "nowhere")
    folder = write_corpus(tmp_path / "text", files=2)
    with pytest.raises(ValueError, match=r"`pattern`: 0 non-empty files .* match '\*\.md'"):
        prepare(folder, "*.md")
    (folder / "document_1.txt").unlink()
    with pytest.raises(ValueError, match=r"`pattern`: 1 non-empty files"):
        prepare(folder)
    write_corpus(folder, files=2)
    with pytest.raises(ValueError, match=r"`max_bytes`: 0 files fit into 10 bytes"):
        prepare(folder, max_bytes=10)
    (tmp_path / "line.txt").write_text("no line end")
    with pytest.raises(ValueError, match=r"`path`: the 11 bytes of .*line.txt"):
        prepare(tmp_path / "line.txt")
    for path in folder.iterdir():
        path.write_bytes(b"\xff\xff\xff")
    with pytest.raises(ValueError, match=r"`path`: no file of the train part of the text is UTF-8"):
        prepare(folder)


def test_too_little_text_for_a_batch_is_counted(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"training text has \d+ tokens, \d windows of `block_size` 9000"):
        ready(corpus, tmp_path, block_size=9000)
    data = ready(corpus, tmp_path, block_size=1)
    data.block_size = 10**6
    with pytest.raises(ValueError, match=r"validation text has \d+ tokens"):
        data.val_dataloader()


def test_a_batch_that_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"`batch_size`: 6 windows cannot be split over 4 processes.*multiple of 4"):
        TrainLoader(TOKENS, 10, 6, world_size=4)


def test_missing_tokenizers_say_what_to_install(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-adapm\[litgpt\]'"):
        module(corpus, tmp_path).prepare_data()


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ValueError, match=r"`cache_dir`: cannot write to .*cache"):
        module(corpus, tmp_path).prepare_data()


def test_calls_out_of_order_say_what_to_call(corpus, tmp_path):
    data = module(corpus, tmp_path)
    with pytest.raises(RuntimeError, match=r"setup\('fit'\)"):
        data.train_dataloader()
    with pytest.raises(RuntimeError, match="prepare_data"):
        data.setup("fit")
