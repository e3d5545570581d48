"""Figures of many pieces as the few that are logged, and the small things the callbacks share."""

import math
from typing import ClassVar

import lightning as L
import pytest
import torch
from foreign import Foreign, fit
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import PlainLM, PlainTraining, token_batches, train

from lightning_adapm import AdaPM, AdaPMMixin, ClosingTable, OptimizerStateMonitor, OptimizerSummary
from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.report.plan import plan
from lightning_adapm.report.tables import show_bytes, show_count, show_saving, summarize
from lightning_adapm.trainer.callbacks import run
from lightning_adapm.trainer.callbacks.closing import RunResult, find_adamw
from lightning_adapm.trainer.callbacks.pooling import Pool, ResidualFigures, layer_labels
from lightning_adapm.trainer.callbacks.run import StepClock


def test_layers_are_numbers_where_there_is_one_stack():
    names = ["model.lm_head.weight", "model.layers.0.mlp.experts.7.weight", "_orig_mod.model.layers.11.q.weight"]
    assert list(layer_labels(names).values()) == ["model.lm_head", "0", "11"]
    names = ["encoder.block.0.q.weight", "decoder.block.0.q.weight"]
    assert list(layer_labels(names).values()) == ["encoder.block.0", "decoder.block.0"]


def test_pool_is_weighted_and_leaves_out_what_nobody_saw():
    pool = Pool(["a", "b", "c"])
    pool.update([("a", 1.0, 1.0), ("a", 4.0, 3.0)])
    pool.update([("b", math.nan, 1.0), ("b", 5.0, 1.0), ("c", 1.0, 0.0)])
    figures = pool.compute()
    assert figures["a"] == (3.25, 4.0)
    assert all(math.isnan(value) for value in figures["b"])
    assert "c" not in figures


def test_pooled_figures_are_means_over_the_pieces():
    model = PlainLM()
    optimizer = AdaPM(model.parameters(), rank=2, momentum="compact", clip_threshold=0.5)
    probe = optimizer.observer = ResidualProbe()
    train(model, optimizer, token_batches(2))
    readings = probe.read()[-len(list(model.parameters())) :]  # of the second step
    names = ResidualFigures(optimizer)
    pool = Pool(names.names)
    pool.update(names.figures(readings))
    logged = names.logged(pool.compute())

    keys = [reading for reading in readings if reading.role == "key" and "norm" in reading.figures]
    assert len(keys) == 2
    norms = [reading.figures["norm"] for reading in keys]
    assert logged["norm_mean/key"] == pytest.approx(sum(norms) / 2)
    assert logged["norm_max/key"] == max(norms)
    clamped = sum(r.figures["clamped"] * r.entries for r in readings if r.entries) / sum(r.entries for r in readings)
    assert logged["clamped/all"] == pytest.approx(clamped)
    assert logged["update_max/all"] == max(reading.figures["update_max"] for reading in readings)
    assert [name for name in names.names if "by_layer" in name][:2] == ["norm_by_layer/0", "norm_by_layer/1"]


@pytest.mark.parametrize(("start", "rung"), [(0, [0, 5, 10]), (5, [5, 10]), (7, [10])])
def test_clock_rings_at_the_same_steps_after_a_resume(start, rung):
    clock = StepClock(5, start)
    assert [step for step in range(start, 13) if clock.rings(step)] == rung


def test_clock_rings_at_the_first_step_that_it_is_asked_about():
    clock = StepClock(5)
    assert [step for step in range(1, 20, 4) if clock.rings(step)] == [1, 5, 13, 17]


def test_summary_adds_up():
    model = PlainLM()
    optimizer = AdaPM(model.parameters(), rank=2)
    rows = plan(optimizer)
    for by in ("role", "parameter"):
        lines = summarize(rows, by)
        assert sum(line.parameters for line in lines) == sum(p.numel() for p in model.parameters())
        assert sum(line.bytes.total for line in lines) == sum(row.bytes.total for row in rows)
    assert len(lines) == len(rows)


def test_bytes_for_people():
    assert [show_bytes(size) for size in (0, 1023, 1024, 1.5 * 2**20, 3 * 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "3.0 GiB",
        "2.00 TiB",
    ]
    assert [show_saving(*pair) for pair in ((1, 4), (3, 0), (100_001, 100_000))] == ["75.0 %", "-", "0.0 %"]
    assert [show_count(n) for n in (7, 1_730, 786_432, 3_100_000, 405_853_388_800)] == [
        "7",
        "1.7 K",
        "786 K",
        "3.1 M",
        "406 B",
    ]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimizerStateMonitor(every_n_steps=0), "every_n_steps must be an int >= 1, but got 0"),
        (lambda: OptimizerSummary(by="layer"), "by must be 'role' or 'parameter', but got 'layer'"),
        (lambda: OptimizerSummary(max_rows=0), "max_rows must be"),
    ],
)
def test_wrong_options(make, words):
    with pytest.raises(MisconfigurationException, match=words):
        make()


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    said = []
    find_spec = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    monkeypatch.setattr(run, "rank_zero_info", said.append)
    run._say_no_matplotlib.cache_clear()
    callbacks = [OptimizerStateMonitor(), OptimizerStateMonitor(log_key_prefix="again/")]
    fit(tmp_path, Foreign(AdaPM), callbacks, max_steps=2)
    assert len(said) == 1
    assert "pip install 'lightning-adapm[plot]'" in said[0]
    assert not list(tmp_path.rglob("*.png"))


def test_a_dry_run_leaves_no_files(tmp_path):
    fit(tmp_path, Foreign(AdaPM), [ClosingTable(), OptimizerStateMonitor()], fast_dev_run=True)
    assert not list(tmp_path.rglob("result.json"))
    assert not list(tmp_path.rglob("*.png"))


def test_only_a_comparable_run_of_adamw_is_shown(tmp_path):
    own = RunResult("AdaPM", 1e-3, 2.0, 1, 2, 3, 4, steps=10, seconds=1.0, trainable_parameters=5, data="x")
    assert find_adamw(own, None) == (None, "")
    assert "there is no result.json" in find_adamw(own, str(tmp_path / "absent"))[1]
    for folder, text, reason in (
        ("text", "no JSON", "result.json is not the result of a run"),
        ("list", "[]", "result.json is not the result of a run"),
        ("adapm", own.to_json(), "is a run of AdaPM"),
        ("data", own.to_json().replace("AdaPM", "AdamW").replace('"x"', '"y"'), "data y and not x"),
    ):
        path = tmp_path / folder / "version_0" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        found, why = find_adamw(own, str(tmp_path / folder))
        assert found is None
        assert reason in why
    path.write_text(own.to_json().replace("AdaPM", "AdamW"))
    found, where = find_adamw(own, str(tmp_path))
    assert found is not None
    assert found.val_loss == 2.0
    assert where == str(path)


def test_a_loss_that_is_not_finite_is_null():
    result = RunResult("AdaPM", 1e-3, math.nan, 1, 2, 3, 4, steps=10, seconds=1.0, trainable_parameters=5)
    assert '"val_loss": null' in result.to_json()
    assert '"ppl": null' in result.to_json()


def test_settings_are_logged_once_and_not_while_looking_for_a_learning_rate(tmp_path):
    class Logger(CSVLogger):
        seen: ClassVar = []

        def log_hyperparams(self, params=None):
            self.seen.append(params)

    class Module(AdaPMMixin, PlainTraining, L.LightningModule):
        adapm: ClassVar = {"no_decay": ("norm",), "state_dtype": torch.float32}

    module, logger = Module(), Logger(tmp_path)
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=logger, enable_progress_bar=False, default_root_dir=tmp_path
    )
    Tuner(trainer).lr_find(module, num_training=20)
    assert logger.seen == []
    trainer.fit(module)
    (settings,) = [params["adapm_settings"] for params in logger.seen]
    assert settings["lr"] == module.lr
    assert settings["momentum"]["value"] == "full"
    assert (settings["no_decay"], settings["state_dtype"]) == (["norm"], "float32")
    assert {"warmup_steps", "schedule", "min_lr_ratio"} < set(settings)
