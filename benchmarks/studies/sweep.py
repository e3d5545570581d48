"""Train what a study asks for and its file lacks, in worker processes, until done or out of time."""

import datetime
import hashlib
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.studies import BESIDE, BEST, Study, adamw
from benchmarks.studies.base import Pretraining
from benchmarks.studies.elsewhere import Images, made_images
from benchmarks.studies.optimizers import missing, resolve
from benchmarks.studies.setting import Device, Run, Setting
from benchmarks.studies.store import Store, command_line, hardware, versions
from benchmarks.studies.text import Text, read_text
from benchmarks.studies.tokens import Answers, Tokens
from benchmarks.studies.training import train

Source = Path | Images | Tokens | Answers | None
"""Source of the data: a text file, images of these sizes, tokens of a text or of answers, or Python's sources."""

_text: dict[Source, Text] = {}


class Group(NamedTuple):
    """Runs that train together, where their results go, and under which name their weights (then no results)."""

    runs: list[Run]
    store: Store | None
    source: Source
    save: str | None = None


class Sweep:
    """The runs of a study on a text, those missing first to last: what the study wants to see first, then seeds before
    learning rates before variants, so that one that stops early has compared everything on some seeds.
    """

    def __init__(self, study: Study, store: Store, source: Source, stack: int) -> None:
        self.study, self.store, self.source, self.stack = study, store, source, stack
        self.text = load(source).name
        self.labels = [label for label in study.variants if not self._absent(label)]

    def _absent(self, label: str) -> str | None:
        reason = missing(self.study.variants[label][0])
        if reason is not None:
            print(f"{label}: skipped, {reason}", flush=True)
        return reason

    def run(self, label: str, lr: float, seed: int) -> Run:
        kind, options = self.study.variants[label]
        return Run(resolve(kind, options), lr, seed, self.study.setting_of(label), self.text)

    def missing(self) -> Iterator[Group]:
        """Runs that the store lacks."""
        for label, rate, seed in self.study.first:
            lr = self._rate(label, rate) if label in self.labels else None
            if lr is not None:
                yield from self._group(label, lr, range(seed, seed + 1))
        for first in range(0, self.study.seeds, self.stack):
            seeds = range(first, min(first + self.stack, self.study.seeds))
            for index in range(max((len(self.study.lrs_of(label)) for label in self.labels), default=0)):
                for label in self.labels:
                    for lr in self.study.lrs_of(label)[index : index + 1]:
                        yield from self._group(label, lr, seeds)

    def beyond(self) -> Iterator[Group]:
        """The next learning rate of each variant whose best is the highest or the lowest one tried."""
        for label in self.labels:
            lr = self._rate(label, BESIDE)
            if lr is not None:
                yield from self._group(label, lr, range(self.study.seeds))

    def _rate(self, label: str, rate: float | str) -> float | None:
        """Resolve a rate of ``Study.first`` by the results so far."""
        if not isinstance(rate, str):
            return rate
        known = sorted({*self.study.lrs_of(label), *self.study.edge_of(label)})
        tried = [lr for lr in known if self.run(label, lr, 0) in self.store]
        if not tried:
            return None
        best = min(tried, key=lambda lr: self.mean(label, lr))
        if rate == BEST:
            return best
        following = known[known.index(best) + 1 :][:1] if best == tried[-1] else []
        below = known[: known.index(best)][-1:] if best == tried[0] else []
        return next(iter(following + below), None)

    def mean(self, label: str, lr: float) -> float:
        """Mean validation loss over the existing seeds; infinite where one diverged."""
        runs = [self.run(label, lr, seed) for seed in range(self.study.seeds)]
        losses = [self.store[run]["val_loss"] for run in runs if run in self.store]
        return statistics.fmean(float("inf") if loss is None else loss for loss in losses)

    def _group(self, label: str, lr: float, seeds: range) -> Iterator[Group]:
        runs = [run for seed in seeds if (run := self.run(label, lr, seed)) not in self.store]
        for first in range(0, len(runs), self.stack):
            yield Group(runs[first : first + self.stack], self.store, self.source)


def sweep(
    studies: list[tuple[Study, Store]],
    data: Path | None,
    device: Device,
    jobs: int,
    stack: int,
    deadline: float,
    first_text: Path | None = None,
) -> None:
    """Train all that is missing of studies, one after the other.

    Args:
        data: Text to train on; None for Python's sources.
        deadline: By ``time.time()``.
        first_text: Text of the weights that a study starts from, likewise.
    """
    session = {
        "command": command_line("python -m benchmarks", sys.argv[1:]),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "hardware": hardware(device.type),
        "versions": versions(),
    }
    gpus = visible_gpus() if device.type == "cuda" else []
    source = source_of(studies[0][0], data, first_text)
    if isinstance(source, Tokens | Answers):
        load(source)  # tokenized once, not by every worker
    with ExitStack() as stop:
        workers = start_workers(jobs, gpus, None if isinstance(source, Images) else source)
        for worker in workers:
            stop.enter_context(worker)
        folder = studies[0][1].path.parent
        queue = Queue(workers, Place(device, folder / "weights", deadline), session)
        plans = []
        for study, store in studies:
            setting = starting(study, first_text, queue, stack) if study.pretrained else study.setting
            plans.append(Sweep(replace(study, setting=setting), store, source_of(study, data, first_text), stack))
        queue.work(distinct(group for plan in plans for group in plan.missing()))
        while queue.complete and queue.work(distinct(group for plan in plans for group in plan.beyond())):
            pass
    if queue.failed:
        raise SystemExit(f"{queue.failed} runs failed: see the errors above")
    if not queue.complete:
        print("Out of time; the same command goes on from here.")


def visible_gpus() -> list[str]:
    """Names of the GPUs that there are for ``CUDA_VISIBLE_DEVICES``."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def start_workers(jobs: int, gpus: list[str], source: Source) -> list[ProcessPoolExecutor]:
    """Processes that wait for runs, each with one thread and, where there are several GPUs, one of them.

    By the environment that it starts with: an import may be enough to fix which GPUs a process sees, and some
    optimizers take every one of these for a process of theirs. Each begins by reading the text.
    """
    context, workers = multiprocessing.get_context("spawn"), []
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    for index in range(jobs):
        if gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
        workers.append(ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(1,)))
        workers[-1].submit(prepare, source)  # which starts the process
    if before is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = before
    elif gpus:
        del os.environ["CUDA_VISIBLE_DEVICES"]
    return workers


def prepare(source: Source) -> None:
    """Read a worker's text."""
    load(source)


def distinct(groups: Iterable[Group]) -> Iterator[Group]:
    """Drop runs that are in an earlier group, because studies share some."""
    seen: set[str] = set()
    for group in groups:
        runs = [run for run in group.runs if run.key not in seen]
        seen |= {run.key for run in runs}
        if runs:
            yield group._replace(runs=runs)


def source_of(study: Study, data: Path | None, first_text: Path | None = None) -> Source:
    """Source of a study's data; ``data`` and ``first_text`` are options of the command line."""
    shape = study.setting.shape
    if isinstance(shape, Images):
        return shape
    if shape.unit != "token":
        return data
    if study.pretrained and data is not None:
        return Answers(data, Tokens(first_text, shape.vocab))
    return Tokens(data, shape.vocab)


def starting(study: Study, first_text: Path | None, queue: "Queue", stack: int) -> Setting:
    """Train the weights that the study starts from, where they are missing; its setting with them named."""
    how, shape = study.pretraining, study.setting.shape
    source: Source = Tokens(first_text, shape.vocab) if shape.unit == "token" else first_text
    text, optimizer = load(source).name, resolve(*adamw(*how.betas))
    setting = replace(study.setting, steps=how.steps, points=10)
    start = f"{shape!r}, {setting.steps} x {setting.batch} windows of {text}"
    if how != Pretraining():  # the weights before there was a choice are named by the text alone
        start += f", lr {how.lr:g}, betas {how.betas[0]:g} {how.betas[1]:g}"
    seeds = max(study.seeds, *(seed + 1 for _, _, seed in study.first), 1)
    runs = [Run(optimizer, how.lr, seed, setting, text) for seed in range(1 if how.once else seeds)]
    runs = [run for run in runs if not weights_file(queue.place.weights, start, run.seed).exists()]
    parts = [runs[first : first + stack] for first in range(0, len(runs), stack)]
    queue.work(Group(part, None, source, save=start) for part in parts)
    if how.once:
        for seed in range(1, seeds):
            weights_file(queue.place.weights, start, seed).unlink(missing_ok=True)
            weights_file(queue.place.weights, start, seed).symlink_to(weights_file(queue.place.weights, start, 0).name)
    return replace(study.setting, start=start)


def weights_file(folder: Path, start: str, seed: int) -> Path:
    return folder / f"{hashlib.sha256(start.encode()).hexdigest()[:8]}-seed{seed}.pt"


@dataclass(frozen=True)
class Place:
    """Settings of a worker, apart from its runs."""

    device: Device
    weights: Path
    deadline: float


class Queue:
    """Hands groups of runs to the workers, and begins none that would not end before the deadline."""

    def __init__(self, workers: list[ProcessPoolExecutor], place: Place, session: dict[str, str]) -> None:
        self.idle, self.place, self.session = list(workers), place, session
        self.complete, self.failed = True, 0
        self.latest: dict[Setting, float] = {}
        """Seconds of the latest group of a setting."""

    def work(self, groups: Iterator[Group]) -> int:
        """Train groups of runs, and keep their results or weights; how many there were. The next one is asked for when
        a worker is free, so that it may depend on results. Once time has run out or a run has failed, ``complete`` is
        False and no more groups are begun in another call.
        """
        running: dict[Future[list[dict[str, Any]] | None], tuple[Group, ProcessPoolExecutor]] = {}
        begun = done = 0
        waiting, ended = None, not self.complete
        while True:
            while self.idle and not ended:
                waiting = waiting or next(groups, None)
                if waiting is None or not self._fits(waiting):
                    ended = waiting is None
                    break
                worker = self.idle.pop(0)
                future = worker.submit(work, waiting.runs, waiting.source, waiting.save, self.place)
                running[future], waiting = (waiting, worker), None
                begun += 1
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                group, worker = running.pop(future)
                self.idle.append(worker)
                done += self._finish(group, future)
        self.complete = self.complete and ended and done == begun
        return begun

    def _finish(self, group: Group, future: "Future[list[dict[str, Any]] | None]") -> bool:
        try:
            results = future.result()
        except Exception:  # the other runs are worth having
            traceback.print_exc()
            self.failed += len(group.runs)
            return False
        for run, result in zip(group.runs, results or (), strict=False):
            if group.store is not None:
                group.store.add(run, result, self.session)
            self.latest[run.setting] = lasting(result) * len(group.runs)
            print(describe(run, result), flush=True)
        return results is not None

    def _fits(self, group: Group) -> bool:
        return time.time() + 1.05 * self.latest.get(group.runs[0].setting, 0.0) < self.place.deadline


def lasting(result: dict[str, Any]) -> float:
    """Seconds that the run of a result takes once its worker has compiled, as it does up to the first point."""
    (start, _, ready), (end, _, seconds) = result["curve"][0], result["curve"][-1]
    if start == end:
        return float(result["seconds"])
    return float(result["seconds"] - ready + start * (seconds - ready) / (end - start))


def load(source: Source) -> Text:
    if source not in _text:
        match source:
            case Images():
                _text[source] = made_images(source)
            case Tokens() | Answers():
                _text[source] = source.read()
            case _:
                _text[source] = read_text(source)
    return _text[source]


def work(runs: list[Run], source: Source, save: str | None, place: Place) -> list[dict[str, Any]] | None:
    """Train one group of runs in a worker."""
    start = runs[0].setting.start
    if save is not None:
        place.weights.mkdir(parents=True, exist_ok=True)
    return train(
        runs,
        load(source),
        place.device,
        place.deadline,
        start=[weights_file(place.weights, start, run.seed) for run in runs] if start else None,
        save=[weights_file(place.weights, save, run.seed) for run in runs] if save else None,
    )


def describe(run: Run, result: dict[str, Any]) -> str:
    usual = resolve(run.optimizer["kind"], {})
    changed = {key: value for key, value in run.optimizer.items() if usual.get(key) != value}
    loss = "diverged" if result["diverged"] else f"{result['val_loss']:.4f}"
    return f"{run.optimizer['kind']} {changed} lr {run.lr:g} seed {run.seed}: {loss} in {result['seconds']:.1f} s"
