import dataclasses
import functools
import json
import lzma
import math
import os
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from benchmarks.__main__ import chosen, parse
from benchmarks.pages.curves import reached
from benchmarks.pages.report import report
from benchmarks.studies import BESIDE, BEST, GROUPS, STUDIES, Study, adamw, adapm, optimizers, sweep
from benchmarks.studies.copies import Copies
from benchmarks.studies.decoder import Shape
from benchmarks.studies.elsewhere import Images, Recurrent, made_images
from benchmarks.studies.optimizers import Library, Parameters, UnavailableError, build, missing, resolve
from benchmarks.studies.setting import Device, Run, Setting
from benchmarks.studies.store import Store
from benchmarks.studies.text import NO_TARGET, Text, read_text
from benchmarks.studies.training import batch_starts, schedule, train, validate
from benchmarks.studies.trials import ExactSVD, GradientDescent, Reprojected, Scaled, Trial, average
from benchmarks.studies.updated import MOMENTS, UpdatedLoRAPre
from lightning_adapm.moments.first import LowRankMomentum

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


def test_results_from_before_a_setting_had_more_fields_are_still_found():
    store = Store(Path(optimizers.__file__).parents[1] / "results" / "main.json")
    study = STUDIES["main"]
    (name,) = {entry.run["text"] for entry in store.own.values() if "3.12.3" in entry.run["text"]}
    assert Run(resolve(*study.variants["AdamW"]), 2e-3, 0, study.setting_of("AdamW"), name) in store
    assert "observe" not in TINY.identity


@pytest.mark.parametrize("setting", [RECURRENT, IMAGES])
@pytest.mark.parametrize("kind", ["AdamW", "AdaPM"])
@pytest.mark.filterwarnings("ignore:AdaPM gives")
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


def low_rank(kind=LowRankMomentum, gap=3):
    return kind(rank=2, beta1=0.9, update_proj_gap=gap)


def stepped(momentum, grads):
    """The state and the last direction, times its scale."""
    state = momentum.make(grads[0].shape, grads[0])
    for step, grad in enumerate(grads, 1):
        used = momentum.direction([grad], [state], step).multiplied()
    return state, used.scale * used.tensors[0]


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_the_exact_basis_is_that_of_an_svd(shape):
    torch.manual_seed(0)
    grads = [torch.randn(shape) for _ in range(4)]  # refreshed at 1 and 4
    before, _ = stepped(low_rank(ExactSVD), grads[:3])
    after, _ = stepped(low_rank(ExactSVD), grads)
    mean = average(grads[3][None], before["exp_avg_l"][None], before["exp_avg_r"][None], 0.9)[0]
    wanted = torch.linalg.svd(mean).Vh[:2]
    torch.testing.assert_close(after["exp_avg_r"].mT @ after["exp_avg_r"], wanted.mT @ wanted, atol=1e-4, rtol=1e-4)


def test_gradient_descent_moves_the_basis_towards_that_of_the_svd():
    torch.manual_seed(0)
    grads = [torch.randn(12, 8) for _ in range(4)]
    before, _ = stepped(low_rank(GradientDescent), grads[:3])
    after, _ = stepped(low_rank(GradientDescent), grads)
    mean = average(grads[3][None], before["exp_avg_l"][None], before["exp_avg_r"][None], 0.9)[0]
    best, _ = stepped(low_rank(ExactSVD), grads)
    held = [(mean @ state["exp_avg_r"].mT).norm().item() for state in (before, after, best)]
    assert held[0] < held[1] <= (torch.linalg.svdvals(mean)[:2].norm() + 1e-5)
    torch.testing.assert_close(after["exp_avg_r"] @ after["exp_avg_r"].mT, torch.eye(2), atol=1e-5, rtol=1e-5)


def test_a_projected_correction_keeps_a_constant_gradient():
    torch.manual_seed(0)
    grad = torch.randn(12, 8)
    for steps in (1, 2, 3, 4, 5, 8):
        _, used = stepped(low_rank(Reprojected), [grad] * steps)
        torch.testing.assert_close(used, grad, atol=1e-5, rtol=1e-5)
    noise = [torch.randn(12, 8) for _ in range(5)]
    theirs, ours = (stepped(low_rank(kind), noise)[1] for kind in (LowRankMomentum, Reprojected))
    assert not torch.allclose(theirs, ours)


def test_a_smaller_residual_scales_what_the_subspace_does_not_see_alone():
    torch.manual_seed(0)
    grads = [torch.randn(12, 8) for _ in range(3)]
    state, plain = stepped(low_rank(), grads)
    _, half = stepped(Scaled(low_rank(), 1.0, residual=0.5), grads)
    _, both = stepped(Scaled(low_rank(), 0.25, residual=0.5), grads)
    inside = state["exp_avg_r"].mT @ state["exp_avg_r"]
    torch.testing.assert_close(half @ inside, plain @ inside, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(half, plain - 0.5 * (plain - plain @ inside), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both, 0.25 * half)


def test_a_matched_residual_shrinks_as_the_average_does():
    torch.manual_seed(0)
    grad = torch.randn(12, 8)
    _, constant = stepped(Scaled(low_rank(), 1.0, residual="matched"), [grad] * 3)
    torch.testing.assert_close(constant, grad, atol=1e-5, rtol=1e-5)  # nothing shrinks where there is no noise
    grads = [torch.randn(12, 8) for _ in range(30)]
    state, plain = stepped(low_rank(gap=100), grads)
    _, matched = stepped(Scaled(low_rank(gap=100), 1.0, residual="matched"), grads)
    inside = state["exp_avg_r"].mT @ state["exp_avg_r"]
    average = state["exp_avg_l"].norm() / (1 - 0.9**30) / (grads[-1] @ state["exp_avg_r"].mT).norm()
    assert 0.1 < average < 0.5
    torch.testing.assert_close(matched - matched @ inside, average * (plain - plain @ inside), atol=1e-5, rtol=1e-4)


def test_scaling_a_policy_scales_its_roles_alone():
    updates = []
    for options in ({}, {"scale": {"none": 0.5}}):
        torch.manual_seed(0)
        model = TINY.shape.build()
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer = build(resolve("trial", {"clip_threshold": None, **options}), Parameters.of(model), 1e-3)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        model(torch.arange(8)[None]).logsumexp(dim=-1).sum().backward()
        optimizer.step()
        updates.append({name: before[name] - param for name, param in model.named_parameters()})
    for name, plain in updates[0].items():
        factor = 0.5 if name in ("wte.weight", "wpe.weight", "blocks.0.attn.proj.weight") else 1.0
        torch.testing.assert_close(updates[1][name], factor * plain, atol=1e-6, rtol=1e-3)


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


def test_a_peer_that_is_not_there_says_what_to_install(monkeypatch):
    assert missing("AdaPM") is None and missing("Adafactor") is None
    monkeypatch.setitem(optimizers.LIBRARIES, "GaLore", Library("no_such_module", "GaLoreAdamW", "galore-torch"))
    assert missing("GaLore").startswith("needs galore-torch: not importable")
    with pytest.raises(UnavailableError, match="no_such_module"):
        build({"kind": "GaLore"}, Parameters.of(TINY.shape.build()), 1e-3)


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
    }.items():
        monkeypatch.setattr("sys.argv", ["benchmarks", *options])
        with pytest.raises(SystemExit):
            parse()
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("momentum", ["none", "low_rank"])
def test_a_damped_update_divides_by_the_second_moment_and_what_no_momentum_averages(momentum):
    torch.manual_seed(0)
    weight, lr, decay, damping = torch.nn.Parameter(torch.randn(24, 16)), 1e-2, 0.1, 2.0
    options = {"betas": (0.5, 0.9), "rank": 0.25, "update_proj_gap": 10, "clip_threshold": None, "eps": 1e-8}
    trial = Trial([("mlp.weight", weight)], lr=lr, weight_decay=decay, momentum=momentum, damping=damping, **options)
    expected, average, left = weight.detach().clone(), torch.zeros(24, 16), torch.zeros(24, 4)
    for step in range(1, 4):
        weight.grad = grad = torch.randn(24, 16)
        trial.step()
        average = 0.9 * average + 0.1 * grad.square()
        basis = trial.state[weight]["exp_avg_r"] if momentum == "low_rank" else torch.zeros(4, 16)
        left = 0.5 * left + 0.5 * grad @ basis.mT
        outside = grad - grad @ basis.mT @ basis
        inside = left / (1 - 0.5**step) @ basis
        root = (average / (1 - 0.9**step) + damping * outside.square()).sqrt()
        expected = (1 - lr * decay) * expected - lr * (outside + inside) / (root + 1e-8)
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize("moments", [MOMENTS, MOMENTS[:1], MOMENTS[1:]], ids=" and ".join)
def test_updated_factors_are_those_that_a_step_leaves_behind(moments):
    torch.manual_seed(0)
    weight, lr, betas = torch.nn.Parameter(torch.randn(12, 8, dtype=torch.float64)), 1e-2, (0.9, 0.95)
    trial = UpdatedLoRAPre([("mlp.weight", weight)], lr=lr, betas=betas, rank=2, weight_decay=0.0, moments=moments)
    before = dict.fromkeys(("exp_avg_l", "exp_avg_sq_l"), torch.zeros(12, 2)) | dict.fromkeys(
        ("exp_avg_r", "exp_avg_sq_r"), torch.zeros(2, 8)
    )
    for step in range(1, 4):
        expected, weight.grad = weight.detach().clone(), torch.randn(12, 8, dtype=torch.float64)
        trial.step()
        after = {key: value.double() for key, value in trial.state[weight].items()}
        first, second = (
            (after if name in moments else before)[f"{key}_l"].double()
            @ (after if name in moments else before)[f"{key}_r"].double()
            for name, key in zip(MOMENTS, ("exp_avg", "exp_avg_sq"), strict=True)
        )
        average = (0.9 * first + 0.1 * weight.grad) / (1 - 0.9**step)
        squares = (0.95 * second.square() + 0.05 * weight.grad.square()) / (1 - 0.95**step)
        torch.testing.assert_close(weight.detach(), expected - lr * average / (squares.sqrt() + 1e-8))
        before = {key: value.clone() for key, value in after.items()}


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
