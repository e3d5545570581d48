"""TextDataModule: what is read, how it is split and cached, and what is refused. The order is in test_order.py."""

import os
import sys

import numpy as np
import pytest
from data_modules import data_module, ready
from texts import write_corpus

from lightning_adapm.data import TextDataModule, TrainLoader, tokens
from lightning_adapm.data.corpus import find_corpus

TOKENS = np.arange(1000, dtype=np.uint16)


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


@pytest.mark.parametrize(("words", "max_bytes"), [(300, None), (300_000, 1000)])
def test_one_line_is_cut_at_the_end_of_a_word(tmp_path, words, max_bytes):
    """As text8, a hundred megabytes of words."""
    path = tmp_path / "one.txt"
    path.write_text("word " * words)
    found = find_corpus(path, "*", None, 0.1, max_bytes)
    (train,), (val,) = (list(found.texts(part)) for part in ("train", "val"))
    assert set(train.split() + val.split()) == {"word"}
    assert len(train + val) == pytest.approx(max_bytes or 5 * words, abs=5)
    assert len(val) == pytest.approx(0.1 * len(train + val), abs=5)


@pytest.mark.parametrize(("sentences", "max_bytes"), [(500, None), (50_000, None), (50_000, 30_001)])
def test_a_line_without_spaces_is_cut_between_characters(tmp_path, sentences, max_bytes):
    path = tmp_path / "novel.txt"
    path.write_text("吾輩は猫である。" * sentences, encoding="utf-8")
    found = find_corpus(path, "*", None, 0.1, max_bytes)
    train, val = ("".join(found.texts(part)) for part in ("train", "val"))
    assert set(train + val) == set("吾輩は猫である。")
    assert len((train + val).encode()) == pytest.approx(max_bytes or 24 * sentences, abs=2)
    assert len(val) == pytest.approx(0.1 * len(train + val), abs=2)


def test_a_file_that_is_no_text_is_one_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a line\n" * 300, encoding="utf-16")
    found = find_corpus(path, "*", None, 0.2, None)
    refused = pytest.raises(ValueError, match="no file of the train part of the text is UTF-8")
    with refused, pytest.warns(UserWarning, match="1 of 1 files are not UTF-8 and are left out: text.txt. Convert"):
        tokens.build_cache(found, 300, tmp_path / "cache")


def test_max_bytes_excluded_folders_and_bytes_that_are_no_text(tmp_path):
    folder = write_corpus(tmp_path / "text", files=8)
    write_corpus(folder / "skipped" / "deep", files=2)
    (folder / "image.txt").write_bytes(b"\xff\xfe\x00 no utf-8")
    (folder / "empty.txt").touch()
    found = find_corpus(folder, "*.txt", ["skipped"], 0.2, None)
    documents = found.train + found.val
    assert {doc.name for doc in documents} == {path.name for path in folder.glob("*.txt")} - {"empty.txt"}
    assert sum(len(list(found.texts(part))) for part in ("train", "val")) == len(documents) - 1

    with pytest.warns(UserWarning, match="1 of 9 files are not UTF-8 and are left out: image.txt. Convert"):
        tokens.build_cache(found, 300, tmp_path / "cache")
    assert find_corpus(folder, "**/*.txt", ["skipped"], 0.2, None) == found

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
    data = data_module(corpus, tmp_path)
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
    with pytest.raises(ValueError, match="`pattern` is empty; write"):
        prepare(folder, "")
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
        data_module(corpus, tmp_path).prepare_data()


def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path):
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ValueError, match=r"`cache_dir`: cannot write to .*cache"):
        data_module(corpus, tmp_path).prepare_data()


def test_a_disk_that_is_full_is_named(corpus, tmp_path, monkeypatch):
    def fill(file, tokens):
        raise OSError("222497 requested and 212928 written")  # NumPy's

    monkeypatch.setattr(np, "save", fill)
    with pytest.raises(ValueError, match=r"`cache_dir`: cannot write to .* \(222497 requested .*; give another folder"):
        data_module(corpus, tmp_path).prepare_data()


def test_calls_out_of_order_say_what_to_call(corpus, tmp_path):
    data = data_module(corpus, tmp_path)
    with pytest.raises(RuntimeError, match=r"setup\('fit'\)"):
        data.train_dataloader()
    with pytest.raises(RuntimeError, match="prepare_data"):
        data.setup("fit")
