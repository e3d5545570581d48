import dataclasses
import json
import math
import time

import pytest
import torch

from benchmarks.pages.report import report
from benchmarks.studies import STUDIES, Study, adamw, adapm
from benchmarks.studies.decoder import Shape
from benchmarks.studies.elsewhere import Images, Recurrent
from benchmarks.studies.optimizers import Parameters, build, missing, resolve
from benchmarks.studies.setting import Device, Run, Setting
from benchmarks.studies.store import Store, command_line
from benchmarks.studies.sweep import sweep
from benchmarks.studies.text import Text, read_text
from benchmarks.studies.training import schedule, train
from benchmarks.studies.trials import DivideAll, TwoTimeScales
from lightning_adapm.moments.first import LowRankMomentum

TINY = Setting(Shape(layers=1, width=16, n_head=2, context=8), steps=4, batch=2, val_windows=4)
TINY_LLAMA = dataclasses.replace(TINY, shape=dataclasses.replace(TINY.shape, llama=True, n_query_groups=1))
CPU = Device()
SMALL = {
    Shape: {"layers": 1, "width": 48, "n_head": 3, "context": 8, "n_query_groups": None},
    Recurrent: {"layers": 1, "width": 16, "context": 8},
    Images: {"blocks": 1, "width": 8, "side": 8},
}


@pytest.fixture(scope="module")
def text():
    return Text("numbers", *(torch.arange(n, dtype=torch.uint8) for n in (200, 100)))


def runs_of(setting, seeds, kind="AdaPM", lr=1e-2, **options):
    return [Run(resolve(kind, options), lr, seed, setting, "numbers") for seed in seeds]


@pytest.mark.parametrize("setting", [TINY, TINY_LLAMA])
@pytest.mark.parametrize("kind", ["AdamW", "AdaPM"])
def test_seeds_that_train_side_by_side_train_as_alone(text, setting, kind):
    runs = runs_of(setting, (0, 1, 2), kind)
    together = train(runs, text, CPU)
    alone = [train([run], text, CPU)[0] for run in runs]
    for a, b in zip(together, alone, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-4)
        assert a["max_update"] == pytest.approx(b["max_update"], rel=1e-3)
    assert len({round(result["val_loss"], 6) for result in alone}) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("setting", [TINY, TINY_LLAMA])
@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_a_recorded_graph_trains_as_the_cpu_does(text, setting, seeds):
    runs = runs_of(setting, seeds)
    for a, b in zip(train(runs, text, Device("cuda")), train(runs, text, CPU), strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-3)


def test_a_run_is_stopped_by_its_deadline_and_marked_where_it_diverges(text):
    assert train(runs_of(TINY, [0]), text, CPU, deadline=time.time() - 1) is None
    (diverged,) = train(runs_of(TINY, [0], "AdamW", lr=1e20), text, CPU)
    assert diverged["diverged"]


def test_training_goes_on_from_saved_weights(text, tmp_path):
    file = tmp_path / "weights.pt"
    train(runs_of(TINY, [0]), text, CPU, save=[file])
    still = dataclasses.replace(TINY, start="saved")
    (first,) = train(runs_of(TINY, [0]), text, CPU)
    (then,) = train(runs_of(still, [1], lr=1e-12), text, CPU, start=[file])
    assert then["val_loss"] == pytest.approx(first["val_loss"], abs=1e-5)


def test_the_schedule_warms_up_and_ends_at_a_tenth():
    rates = [schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)


def test_a_run_is_identified_by_all_that_its_result_depends_on():
    run = runs_of(TINY, [0])[0]
    assert run.key == Run(json.loads(json.dumps(run.optimizer)), 1e-2, 0, TINY, "numbers").key
    assert run.key == runs_of(TINY, [0], clip_threshold=run.optimizer["clip_threshold"])[0].key
    others = [
        runs_of(TINY, [1])[0],
        runs_of(TINY_LLAMA, [0])[0],
        runs_of(TINY, [0], rank=0.25)[0],
        runs_of(TINY, [0], momentum={"mlp": "full"})[0],
        dataclasses.replace(run, text="letters"),
        dataclasses.replace(run, lr=2e-2),
    ]
    assert len({run.key, *(other.key for other in others)}) == 7


@pytest.mark.parametrize("name", STUDIES)
def test_every_variant_of_a_study_takes_a_step(name):
    study = STUDIES[name]
    assert {label for labels in study.baselines.values() for label in labels} <= set(study.variants)
    shape = dataclasses.replace(study.setting.shape, **SMALL[type(study.setting.shape)])
    there = [variant for variant in study.variants.values() if missing(variant[0]) is None]
    assert len(there) > len(study.variants) / 2
    for variant in there:
        model = shape.build()
        named = ((f"copy0.{name}", param) for name, param in model.named_parameters())
        optimizer = build(json.loads(json.dumps(resolve(*variant))), Parameters.of(model, named), 1e-3)
        before = [param.clone() for param in model.parameters()]
        model(torch.arange(shape.context)[None]).logsumexp(dim=-1).sum().backward()
        optimizer.step()
        changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert all(changed)


def test_dividing_everything_is_the_published_first_step():
    torch.manual_seed(0)
    grad, published = torch.randn(12, 8), DivideAll(rank=2, beta1=0.9, update_proj_gap=10)
    state = published.make(grad.shape, grad)
    used = published.direction([grad], [state], 1).multiplied()
    inside = grad @ state["exp_avg_r"].mT @ state["exp_avg_r"]
    torch.testing.assert_close(used.scale * used.tensors[0], inside + (grad - inside) / (1 - 0.9))


def test_two_equal_time_scales_are_one():
    torch.manual_seed(0)
    single = LowRankMomentum(rank=2, beta1=0.9, update_proj_gap=2)
    double = TwoTimeScales(single, single)
    shape = torch.Size((12, 8))
    one, two = single.make(shape, torch.zeros(())), double.make(shape, torch.zeros(()))
    assert sum(value.numel() for value in two.values() if torch.is_tensor(value)) == 2 * 2 * (12 + 8)
    for step in range(1, 5):
        grad = torch.randn(shape)
        ours, both = single.direction([grad], [one], step), double.direction([grad], [two], step)
        (a,), (b,) = ours.multiplied().tensors, both.tensors
        torch.testing.assert_close(a, 0.5 * b)


def test_a_text_file_is_split_and_named_by_its_content(tmp_path):
    file = tmp_path / "some.txt"
    file.write_bytes(bytes(range(200)))
    text = read_text(file)
    assert len(text.train) == 190 and text.val.tolist() == list(range(190, 200))
    name = text.name
    file.write_bytes(bytes(reversed(range(200))))
    assert name.startswith("some.txt") and read_text(file).name != name
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        read_text(file)


@pytest.fixture
def study():
    variants = {"AdamW": adamw(), "AdaPM": adapm()}
    return Study("Which?", variants, (1e-3, 2e-3), (4e-3,), 1, TINY, baselines={"AdamW": ("AdamW",)})


def test_a_study_runs_resumes_and_reports(study, tmp_path):
    data = tmp_path / "data.txt"
    data.write_bytes(bytes(range(250)) * 20)
    path = tmp_path / "results" / "study.json"

    sweep([(study, Store(path))], data, CPU, jobs=1, stack=2, deadline=time.time() - 1)
    assert not path.exists()
    sweep([(study, Store(path))], data, CPU, jobs=1, stack=2, deadline=math.inf)
    first = Store(path).own
    rates = {entry.run["lr"] for entry in first.values()}
    assert {1e-3, 2e-3} <= rates and all(len(entry.result["curve"]) == 4 for entry in first.values())

    more = dataclasses.replace(study, seeds=2, edge=())
    sweep([(more, Store(path))], data, CPU, jobs=1, stack=2, deadline=math.inf)
    then = Store(path).own
    assert {key: then[key] for key in first} == first
    assert sum(entry.run["seed"] == 1 for entry in then.values()) == 4

    beside = Store(path.with_name("other.json"))
    assert not beside.own and beside.known == then
    elsewhere = Store(tmp_path / "elsewhere" / "study.json")
    assert (elsewhere.merge(path), elsewhere.merge(path)) == (len(then), 0)
    assert Store(elsewhere.path).own == then
    report("study", more, Store(path))
    page = path.with_name("study.md").read_text()
    assert "minus AdamW's best" in page and "(2)" in page and then.popitem()[1].session["command"] in page
    assert path.with_name("study.svg").exists() and "svg" not in page


def test_a_recorded_command_names_no_place():
    words = ["main", "--only", "AdaPM block", "--data", "/somewhere/text.xz", "--output", "/tmp/out", "--jobs", "2"]
    assert command_line("python -m benchmarks", words) == (
        "python -m benchmarks main --only 'AdaPM block' --data text.xz --jobs 2"
    )


def test_crossed_options_are_shown_against_each_other(study, tmp_path):
    rows = {f"{rank}, {gap}": adapm(rank=rank, update_proj_gap=gap) for gap in (10, 2) for rank in (0.5, 0.25)}
    crossed = dataclasses.replace(study, variants={"AdamW": adamw(), **rows}, crossed=("update_proj_gap", "rank"))
    store = Store(tmp_path / "study.json")
    for loss, variant in enumerate(crossed.variants.values()):
        result = {"val_loss": float(loss), "curve": [], "max_update": 1.0, "diverged": False, "seconds": 1.0}
        run = Run(resolve(*variant), 1e-3, 0, TINY, "numbers")
        store.add(run, result, {"command": "c", "date": "d", "hardware": "h", "versions": "v"})
    report("study", crossed, Store(store.path))
    page = (tmp_path / "study.md").read_text()
    assert "| | 2 | 10 |" in page and "| 0.25 | 4.0000 | 2.0000 |" in page and "| 0.5 | 3.0000 | 1.0000 |" in page


def test_the_report_compares_seed_by_seed_and_leaves_out_what_diverged(study, tmp_path):
    store = Store(tmp_path / "study.json")
    losses = {"AdamW": {1e-3: (2.0, 3.0), 2e-3: (2.5, None)}, "AdaPM": {1e-3: (1.8, 2.6)}}
    for label, by_lr in losses.items():
        for lr, values in by_lr.items():
            for seed, loss in enumerate(values):
                result = {"val_loss": loss, "curve": [], "max_update": 1.0, "diverged": loss is None, "seconds": 1.0}
                run = Run(resolve(*study.variants[label]), lr, seed, TINY, "numbers")
                store.add(run, result, {"command": "c", "date": "d", "hardware": "h", "versions": "v"})
    report("study", study, Store(store.path))
    page = (tmp_path / "study.md").read_text()
    assert "**2.5000 ± 0.5000 (2)**" in page  # AdamW at 1e-3
    assert "1 of 2 diverged" in page
    assert "-0.3000 ± 0.1000 (2)" in page  # -0.2 and -0.4
    assert "| seconds |" in page
    store.add(dataclasses.replace(run, seed=2), result, {"command": "c", "date": "d", "hardware": "g", "versions": "v"})
    report("study", study, Store(store.path))
    assert "seconds |" not in (tmp_path / "study.md").read_text()  # of several processors
