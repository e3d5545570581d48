"""``lightning-adapm prepare``, and litgpt's data module over what it writes."""

import json

import numpy as np
import pytest
import torch
from finetuning import write_tokenizer
from lightning import Fabric
from litgpt.data import JSON
from litgpt.tokenizer import Tokenizer
from litgpt_commands import write_text
from texts import write_corpus

from lightning_adapm.__main__ import main
from lightning_adapm.data.docstrings import instructions
from lightning_adapm.litgpt import data as litgpt_data
from lightning_adapm.litgpt.data import PreparedText

SOURCES = '''
def area(width: float, height: float = 1.0) -> float:
    """The area of a rectangle,
    in square metres.

    More about it."""

class Shape:
    async def grow(self, *, by):
        """Make it larger by a factor."""

    def plain(self):
        return 1

    def short(self):
        """Short."""
'''


@pytest.fixture(scope="module")
def text(corpus, tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("prepared") / "text", corpus)


def connected(text, micro_batch=2, positions=8):
    data = PreparedText(text)
    data.connect(Tokenizer(text), micro_batch, positions)
    return data


def test_questions_are_made_of_docstrings():
    assert instructions([SOURCES, SOURCES, "not python("]) == [
        {
            "instruction": "What does this Python function do?\ndef area(width: float, height: float=1.0):",
            "input": "",
            "output": "The area of a rectangle, in square metres.",
        },
        {
            "instruction": "What does this Python function do?\ndef grow(self, *, by):",
            "input": "",
            "output": "Make it larger by a factor.",
        },
    ]


def test_what_is_prepared_is_what_litgpt_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index in range(8):
        (tmp_path / f"source_{index}.py").write_text(SOURCES.replace("area", f"area_{index}"))
    main(["prepare", "--path=.", "--vocab_size=300", "--cache_dir=cache", "--val_fraction=0.3"])
    folder = tmp_path / "data" / "quickstart"
    tokenizer, tokens = Tokenizer(folder), np.load(folder / "train.npy")
    assert "return 1" in tokenizer.decode(torch.from_numpy(tokens.astype(np.int64)))
    assert tokenizer.eos_id in tokens
    samples = {part: json.loads((folder / "instructions" / f"{part}.json").read_text()) for part in ("train", "val")}
    assert f"data/quickstart/instructions/val.json: {len(samples['val'])}\n" in capsys.readouterr().out
    data = JSON(folder / "instructions")
    assert [len(part) for part in data.get_splits()] == [len(samples["train"]), len(samples["val"])]
    data.connect(tokenizer, 1, 256)
    data.setup()
    row = next(iter(data.train_dataloader()))["input_ids"][0]
    assert "What does this Python function do?" in tokenizer.decode(row)


def test_text_without_docstrings_has_no_questions(text):
    assert (text / "train.npy").is_file()
    assert not (text / "instructions").exists()


def test_processes_share_the_batches_of_one(text, monkeypatch):
    def batches(rank, world_size, micro_batch):
        monkeypatch.setattr(litgpt_data, "_processes", lambda: {"rank": rank, "world_size": world_size})
        data = connected(text, micro_batch)
        return [torch.stack(list(loader)) for loader in (data.train_dataloader(), data.val_dataloader())]

    whole, halves = batches(0, 1, 4), [batches(rank, 2, 2) for rank in range(2)]
    for index, both in enumerate(zip(*halves, strict=True)):
        assert torch.equal(torch.cat(both, dim=1), whole[index])
        assert whole[index].shape[2] == 9
        assert whole[index].dtype == torch.int64


def test_fabric_saves_and_resumes_the_position(text, tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(connected(text).train_dataloader())
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    fabric.save(tmp_path / "state.ckpt", {"train_dataloader": loader})
    again = fabric.setup_dataloaders(connected(text).train_dataloader())
    fabric.load(tmp_path / "state.ckpt", {"train_dataloader": again})
    assert torch.equal(next(iter(again)), next(batches))
    assert connected(text).val_dataloader().state_dict() == {}


def test_what_is_missing_is_named(text, tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json in .*; write lightning-adapm prepare --out_dir"):
        PreparedText(tmp_path)
    data = PreparedText(text)
    with pytest.raises(ValueError, match="`tokenizer_dir`: PreparedText needs the tokenizer .* but got none; give"):
        data.connect(None, 1, 8)
    with pytest.raises(ValueError, match="but got 'other'; give"):
        data.connect(Tokenizer(write_tokenizer(tmp_path / "other")), 1, 8)
    with pytest.raises(ValueError, match="`max_seq_length`"):
        data.connect(Tokenizer(text), 1)
    with pytest.raises(SystemExit, match="`path`: there is no 'nowhere'"):
        main(["prepare", "--path=nowhere"])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="`out_dir`: cannot write to '.*file' .*; give another folder"):
        main(["prepare", f"--path={write_corpus(tmp_path)}", "--pattern=*.txt", f"--out_dir={tmp_path}/file"])
