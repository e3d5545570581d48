"""Training of studies: other models, the loss, validation, several runs side by side, as alone."""

import dataclasses
import functools
import json
import lzma

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.studies.copies import Copies
from benchmarks.studies.decoder import Shape
from benchmarks.studies.elsewhere import Images, Recurrent, made_images
from benchmarks.studies.optimizers import Parameters, build, resolve
from benchmarks.studies.setting import Device, Run, Setting
from benchmarks.studies.text import NO_TARGET, Text, read_text
from benchmarks.studies.training import batch_starts, schedule, train, validate

CPU = Device()
TINY = Setting(Shape(layers=1, width=16, n_head=2, context=8), steps=4, batch=2, val_windows=4)
RECURRENT = Setting(Recurrent(layers=1, width=16, context=8), steps=4, batch=2, val_windows=4)
IMAGES = Setting(Images(blocks=2, width=8, side=8), steps=4, batch=2, val_windows=4)
TAUGHT = {Recurrent: {"roles": {r"weight_(ih|hh)": "low_rank"}}, Images: {"unmatched": "low_rank"}}


@pytest.fixture(scope="module")
def text():
    return Text("numbers", *(torch.arange(n, dtype=torch.uint8) for n in (200, 100)))


def run_of(setting, seed=0, kind="AdaPM", lr=1e-2, **options):
    return Run(resolve(kind, options), lr, seed, setting, "numbers")


@pytest.mark.parametrize("setting", [RECURRENT, IMAGES])
@pytest.mark.parametrize("kind", ["AdamW", "AdaPM"])
@pytest.mark.filterwarnings("ignore:unmatched=")
def test_other_models_train_side_by_side_as_alone(text, setting, kind):
    data = made_images(setting.shape, 50, 20) if isinstance(setting.shape, Images) else text
    options = TAUGHT[type(setting.shape)] if kind == "AdaPM" else {}
    # at 1e-2 four steps on two images amplify the last bits of a product to 1e-2; in float64 they do not
    runs = [run_of(setting, seed, kind, lr=1e-3, **options) for seed in (0, 1)]
    together = train(runs, data, CPU)
    alone = [train([run], data, CPU)[0] for run in runs]
    for a, b in zip(together, alone, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)
    assert alone[0]["val_loss"] != alone[1]["val_loss"]


@pytest.mark.parametrize("setting", [RECURRENT, IMAGES])
def test_what_is_no_transformer_is_refused_until_it_is_taught(setting):
    with pytest.raises(ValueError, match="role"):
        build(resolve("AdaPM", {}), Parameters.of(setting.shape.build()), 1e-3)


def test_images_can_be_told_apart_and_only_their_label_is_a_target():
    shape = Images(blocks=1, width=8, side=8)
    data = made_images(shape, 40, 10)
    records = data.train.view(40, shape.context + 1)
    assert (records[:, :-1] >= NO_TARGET).all() and (records[:, -1] < shape.vocab).all()
    assert data.starts[0].tolist() == [index * (shape.context + 1) for index in range(40)]
    assert data.name == made_images(shape, 40, 10).name != made_images(shape, 41, 10).name


def test_of_questions_and_answers_the_answers_alone_are_targets(tmp_path):
    file = tmp_path / "some.jsonl.xz"
    lines = [json.dumps({"question": f"{n}+{n}?", "answer": "é" * n}) for n in range(40)]
    file.write_bytes(lzma.compress("\n".join(lines).encode()))
    data = read_text(file)
    begin, end = data.starts[0][3], data.starts[0][4]
    record = data.train[begin:end]
    asked = bytes((record[record >= NO_TARGET] - NO_TARGET).tolist()).decode()
    assert asked == "3+3?\n" and bytes(record[record < NO_TARGET].tolist()).decode() == "ééé\n\n"
    assert len(data.starts[0]) == 38 and len(data.starts[1]) == 2
    assert set(batch_starts(data, TINY, seed=0).flatten().tolist()) <= set(data.starts[0].tolist())

    file.with_suffix("").write_text('{"question": "why?"}\n')
    with pytest.raises(ValueError, match="line 1 is not"):
        read_text(file.with_suffix(""))
    file.with_suffix("").write_text(lines[0])
    with pytest.raises(ValueError, match="holds 1 lines"):
        read_text(file.with_suffix(""))


def test_the_loss_is_the_mean_over_targets():
    copies = Copies(TINY, [0], CPU, None)
    windows = torch.arange(2 * 9).view(1, 2, 9)
    logits = copies.models[0](windows[0, :, :-1]).log_softmax(-1)
    each = -logits.gather(1, windows[0, :, 1:].reshape(-1, 1)).view(2, 8)
    torch.testing.assert_close(copies.losses(windows)[0], each.mean())
    windows[0, 0, :5] += NO_TARGET
    torch.testing.assert_close(copies.losses(windows)[0], torch.cat([each[0, 4:], each[1]]).mean())


def test_validation_looks_at_the_records_it_is_given():
    copies = Copies(TINY, [0], CPU, None)
    val = torch.arange(100)
    starts = torch.tensor([]), torch.tensor([0, 40, 91, 95])
    wanted = torch.stack([copies.losses(val[s : s + 9][None, None]).detach()[0] for s in (0, 0, 40, 91)]).mean()
    assert validate(copies, val, starts)[0] == pytest.approx(wanted.item(), abs=1e-5)


def test_the_learning_rate_changes_at_once():
    before, after = ([schedule(step, 100, change) for step in range(100)] for change in (None, (0.5, 3.0)))
    assert after[:50] == before[:50] and after[50:] == pytest.approx([3 * rate for rate in before[50:]])


def test_a_run_that_is_observed_shows_its_updates_by_role(text):
    setting = Setting(TINY.shape, steps=6, batch=2, val_windows=4, observe=3, points=2)
    runs = [run_of(setting, seed, rank=2) for seed in (0, 1)]
    first, second = train(runs, text, CPU)
    (alone,) = train(runs[1:], text, CPU)
    assert first["observed"]["steps"] == [2, 5] and len(first["curve"]) == 2
    assert first["curve"][0][2] <= first["curve"][1][2]
    mlp = second["observed"]["roles"]["mlp"]
    assert set(mlp) == {"update_rms", "residual", "stationarity"}
    assert set(first["observed"]["roles"]["value"]) == {"update_rms"}
    assert all(0 < value <= 1 for value in mlp["update_rms"]) and all(0 < value < 1 for value in mlp["residual"])
    assert mlp["update_rms"] == pytest.approx(alone["observed"]["roles"]["mlp"]["update_rms"], abs=1e-2)
    plain = train([run_of(TINY, rank=2)], text, CPU)[0]
    assert "observed" not in plain


def test_a_schedule_reaches_both_halves_of_muon():
    model = TINY.shape.build()
    optimizer = build({"kind": "Muon"}, Parameters.of(model), 1e-3)
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.arange(8)[None]).logsumexp(dim=-1).sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_adam_mini_has_a_block_for_every_head_of_a_fused_weight_and_every_row_of_a_table():
    model = TINY.shape.build()
    named = [(f"copy0.{name}", param) for name, param in model.named_parameters()]
    optimizer = build({"kind": "adam_mini", "betas": [0.9, 0.95]}, Parameters.of(model, named), 1e-3)
    model(torch.arange(8)[None]).logsumexp(dim=-1).sum().backward()
    optimizer.step()
    blocks = {name: optimizer.state[param]["vmean"].numel() for name, param in named if param.dim() == 2}
    attention = blocks.pop("copy0.blocks.0.attn.qkv.weight")
    assert attention == 3 * TINY.shape.n_head
    assert blocks == {name: len(param) for name, param in named if name in blocks}


def test_compiled_models_train_as_written_and_later_runs_compile_nothing(text, monkeypatch):
    """With the front end of the compiler alone: what it generates is not ours."""
    torch._dynamo.reset()
    counter, setting = CompileCounter(), dataclasses.replace(TINY, val_windows=2)
    setting = dataclasses.replace(setting, shape=dataclasses.replace(TINY.shape, layers=3))
    runs = [Run(resolve(kind, {}), 1e-2, 0, setting, "numbers") for kind in ("AdamW", "AdaPM")]
    written = [train([run], text, CPU)[0]["val_loss"] for run in runs]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    compiled = [train([run], text, Device(compile=True))[0]["val_loss"] for run in runs]
    assert compiled == pytest.approx(written, abs=1e-5)
    assert counter.frame_count == 3  # a block with and without gradients, and the largest update
