"""Sweeps of studies: which runs, in which order, on which workers, and what is kept of them."""

import math
import os
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import chosen, parse
from benchmarks.pages.curves import reached
from benchmarks.pages.report import report
from benchmarks.studies import BESIDE, BEST, GROUPS, STUDIES, Study, adamw, adapm, optimizers, sweep
from benchmarks.studies.decoder import Shape
from benchmarks.studies.optimizers import Library, Parameters, UnavailableError, build, missing, resolve
from benchmarks.studies.setting import Device, Run, Setting
from benchmarks.studies.store import Store

CPU = Device()
TINY = Setting(Shape(layers=1, width=16, n_head=2, context=8), steps=4, batch=2, val_windows=4)


def test_results_from_before_other_defaults_and_more_fields_are_still_found():
    store = Store(Path(optimizers.__file__).parents[1] / "results" / "main.json")
    study = STUDIES["main"]
    (name,) = {entry.run["text"] for entry in store.own.values() if "3.12.3" in entry.run["text"]}
    for label in ("AdamW", "AdaPM, paper", "AdaPM smallest", "AdaPM block, paper, betas .9 .95", "Adam-mini"):
        assert Run(resolve(*study.variants[label]), 2e-3, 0, study.setting_of(label), name) in store
    assert "observe" not in TINY.identity


def test_a_peer_that_is_not_there_says_what_to_install(monkeypatch):
    assert missing("AdaPM") is None and missing("Adafactor") is None
    monkeypatch.setitem(optimizers.LIBRARIES, "GaLore", Library("no_such_module", "GaLoreAdamW", "galore-torch"))
    assert missing("GaLore").startswith("needs galore-torch: not importable")
    with pytest.raises(UnavailableError, match="no_such_module"):
        build({"kind": "GaLore"}, Parameters.of(TINY.shape.build()), 1e-3)


@pytest.mark.parametrize(("loss", "step"), [(3.0, 10), (2.5, 15.0), (2.0, 20.0), (0.5, None), (1.25, 27.5)], ids=str)
def test_the_step_that_reaches_a_loss_is_interpolated(loss, step):
    assert reached([[10, 3.0], [20, 2.0, 1.5], [30, 1.0, 2.0]], loss) == step


def test_studies_that_share_runs_train_them_once_and_report_curves(tmp_path):
    data = tmp_path / "data.txt"
    data.write_bytes(bytes(range(250)) * 20)
    variants = {"AdamW": adamw(), "AdaPM": adapm(), "AdamW, longer": adamw(), "lost": ("lost", {})}
    study = Study(
        "Which?", variants, (1e-3,), (), 2, TINY, curves=True, baselines={"AdamW": ("AdamW",)},
        rates={"AdaPM": (2e-3,)}, changes={"AdamW, longer": {"length": 2}},
    )  # fmt: skip
    optimizers.LIBRARIES["lost"] = Library("no_such_module", "Lost", "lost-package")
    try:
        paths = [tmp_path / "results" / f"{name}.json" for name in ("one", "other")]
        sweep.sweep([(study, Store(path)) for path in paths], data, CPU, jobs=1, stack=2, deadline=math.inf)
        report("one", study, Store(paths[0]))
    finally:
        del optimizers.LIBRARIES["lost"]
    first, second = (Store(path) for path in paths)
    report("other", study, second)
    assert not paths[1].with_suffix(".md").exists()
    assert len(first.own) == 6 and not second.own and set(second.known) == set(first.own)
    assert {entry.run["lr"] for entry in first.own.values() if entry.run["optimizer"]["kind"] == "AdaPM"} == {2e-3}
    assert {entry.run["setting"]["steps"] for entry in first.own.values()} == {4, 8}
    page = paths[0].with_suffix(".md").read_text()
    assert "| AdamW | 4 |" in page and "| AdamW, longer | 8 |" in page and "2 of 2" in page
    assert "needs lost-package" in page


def test_workers_start_with_one_gpu_each(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    data = tmp_path / "data.txt"
    data.write_bytes(bytes(range(250)))
    workers = sweep.start_workers(3, sweep.visible_gpus(), data)
    starts = [worker.submit(Path("/proc/self/environ").read_text).result() for worker in workers]
    for worker in workers:
        worker.shutdown()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,5"
    seen = [entry for start in starts for entry in start.split("\0") if entry.startswith("CUDA_VISIBLE_DEVICES=")]
    assert [entry[-1] for entry in seen] == ["2", "5", "2"]


def test_a_group_is_studies_and_a_size_is_part_of_the_name(monkeypatch, capsys):
    assert all(name in STUDIES for names in GROUPS.values() for name in names)
    monkeypatch.setattr("sys.argv", ["benchmarks", "ablation"])
    assert parse().studies == GROUPS["ablation"]
    monkeypatch.setattr("sys.argv", ["benchmarks", "convergence", "--seeds", "2", "--size", "1M"])
    args = parse()
    small = chosen(STUDIES["convergence"], args)
    assert (small.seeds, small.setting.shape.width) == (2, 128)
    for options, message in {
        ("ablation", "--only", "AdamW"): "--only go with one study",
        ("images", "--size", "1M"): "GPT-2-like",
        ("images", "--merge", "absent.json"): "absent.json does not exist",
    }.items():
        monkeypatch.setattr("sys.argv", ["benchmarks", *options])
        with pytest.raises(SystemExit):
            parse()
        assert message in capsys.readouterr().err


def test_a_study_begins_with_the_runs_that_it_wants_first(tmp_path):
    first = (("AdaPM", 2e-3, 1), ("AdamW", 1e-3, 0))
    study = Study("Which?", {"AdamW": adamw(), "AdaPM": adapm()}, (1e-3, 2e-3), (), 2, TINY, first=first)
    data = tmp_path / "data.txt"
    data.write_bytes(bytes(range(250)))
    found = list(sweep.distinct(sweep.Sweep(study, Store(tmp_path / "study.json"), data, stack=1).missing()))
    runs = [(run.optimizer["kind"], run.lr, run.seed) for group in found for run in group.runs]
    assert runs[:4] == [*first, ("AdaPM", 1e-3, 0), ("AdamW", 2e-3, 0)] and len(runs) == len(set(runs)) == 8


def test_a_run_is_expected_to_last_as_long_as_the_last_one_but_for_its_first_part():
    curve = [[10, 2.0, 33.0], [20, 1.5, 36.0], [40, 1.0, 42.0]]  # 30 s were not training
    assert sweep.lasting({"curve": curve, "seconds": 44.0}) == pytest.approx(14.0)
    assert sweep.lasting({"curve": curve[:1], "seconds": 34.0}) == 34.0


def test_a_rate_may_depend_on_the_results_so_far(tmp_path):
    first = (("AdamW", BESIDE, 0), ("AdamW", BEST, 1))
    study = Study("Which?", {"AdamW": adamw()}, (1e-3, 2e-3), (4e-3,), 2, TINY, first=first)
    data, path = tmp_path / "data.txt", tmp_path / "study.json"
    data.write_bytes(bytes(range(250)))
    for losses, expected in (
        ({}, []),
        ({1e-3: 2.0, 2e-3: 1.0}, [(4e-3, 0), (2e-3, 1)]),
        ({1e-3: 2.0, 2e-3: 1.0, 4e-3: 3.0}, [(2e-3, 1)]),
        ({2e-3: 1.0, 4e-3: 3.0}, [(1e-3, 0), (2e-3, 1)]),
    ):
        path.unlink(missing_ok=True)
        plan = sweep.Sweep(study, Store(path), data, stack=1)
        for lr, loss in losses.items():
            result = {"val_loss": loss, "curve": [], "max_update": 1.0, "diverged": False, "seconds": 1.0}
            plan.store.add(plan.run("AdamW", lr, 0), result, dict.fromkeys(("command", "date", "hardware"), ""))
        found = [(run.lr, run.seed) for group in plan.missing() for run in group.runs]
        assert found[: len(expected)] == expected


@pytest.mark.parametrize(("losses", "beyond"), [((1.0, 2.0), [5e-4]), ((2.0, 1.0), [4e-3])], ids=["lowest", "highest"])
def test_a_best_rate_at_an_edge_is_followed_by_the_next_one_beyond(tmp_path, losses, beyond):
    study = Study("Which?", {"AdamW": adamw()}, (1e-3, 2e-3), (4e-3, 5e-4), 1, TINY)
    data = tmp_path / "data.txt"
    data.write_bytes(bytes(range(250)))
    plan = sweep.Sweep(study, Store(tmp_path / "study.json"), data, stack=1)
    for lr, loss in zip(study.lrs, losses, strict=True):
        result = {"val_loss": loss, "curve": [], "max_update": 1.0, "diverged": False, "seconds": 1.0}
        plan.store.add(plan.run("AdamW", lr, 0), result, dict.fromkeys(("command", "date", "hardware"), ""))
    assert [run.lr for group in plan.beyond() for run in group.runs] == beyond


def test_the_next_run_is_asked_for_when_a_worker_is_free(tmp_path):
    asked = []

    class Worker:
        def submit(self, work, runs, *rest):
            future = Future()
            future.set_result([])
            asked.append(f"{runs} begins")
            return future

    def groups():
        for name in "abc":
            asked.append(f"{name} is asked for")
            yield sweep.Group([SimpleNamespace(setting=name)], None, None)

    queue = sweep.Queue([Worker()], sweep.Place(CPU, tmp_path, math.inf), {})
    assert queue.work(groups()) == 3 and queue.complete
    assert [line.split()[-1] for line in asked] == ["for", "begins"] * 3
