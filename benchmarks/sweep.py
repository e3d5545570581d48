"""Train what a study asks for and its file lacks, in worker processes, until done or out of time."""

import datetime
import hashlib
import multiprocessing
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.optimizers import resolve
from benchmarks.store import Store, hardware, versions
from benchmarks.studies import Study, adamw
from benchmarks.text import Text, read_text
from benchmarks.training import Device, Run, Setting, train

PRETRAINING_LR, PRETRAINING_STEPS = 2e-3, 600

_text: dict[Path | None, Text] = {}


class Sweep:
    """The runs of a study on a text, those missing first to last: seeds before learning rates before variants, so
    that one that stops early has compared everything on some seeds.
    """

    def __init__(self, study: Study, store: Store, text: str, stack: int) -> None:
        self.study, self.store, self.text, self.stack = study, store, text, stack

    def run(self, label: str, lr: float, seed: int) -> Run:
        kind, options = self.study.variants[label]
        return Run(resolve(kind, options), lr, seed, self.study.setting, self.text)

    def missing(self) -> Iterator[list[Run]]:
        """Groups of runs that train together."""
        for first in range(0, self.study.seeds, self.stack):
            seeds = range(first, min(first + self.stack, self.study.seeds))
            for lr in self.study.lrs:
                for label in self.study.variants:
                    yield from self._group(label, lr, seeds)

    def beyond(self) -> Iterator[list[Run]]:
        """The next higher learning rate of each variant whose best is its highest."""
        for label in self.study.variants:
            tried = [lr for lr in (*self.study.lrs, *self.study.edge) if self.run(label, lr, 0) in self.store]
            following = [lr for lr in self.study.edge if lr not in tried]
            if tried and following and min(tried, key=lambda lr: self.mean(label, lr)) == max(tried):
                yield from self._group(label, following[0], range(self.study.seeds))

    def mean(self, label: str, lr: float) -> float:
        """Of the validation loss over the seeds there are; infinite where one diverged."""
        runs = [self.run(label, lr, seed) for seed in range(self.study.seeds)]
        losses = [self.store[run]["val_loss"] for run in runs if run in self.store]
        return statistics.fmean(float("inf") if loss is None else loss for loss in losses)

    def _group(self, label: str, lr: float, seeds: range) -> Iterator[list[Run]]:
        runs = [run for seed in seeds if (run := self.run(label, lr, seed)) not in self.store]
        for first in range(0, len(runs), self.stack):
            yield runs[first : first + self.stack]


def sweep(
    study: Study, store: Store, data: Path | None, device: Device, jobs: int, stack: int, deadline: float
) -> None:
    """Train all that is missing; ``deadline`` is of ``time.time()``."""
    session = {
        "command": "python -m benchmarks " + shlex.join(sys.argv[1:]),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "hardware": hardware(device.type),
        "versions": versions(),
    }
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        place = Place(device, data, store.path.parent / "weights", deadline)
        queue = Queue(pool, store, place, jobs, session)
        setting = starting(study, queue, stack) if study.pretrained else study.setting
        plan = Sweep(replace(study, setting=setting), store, load_text(data).name, stack)
        queue.work(list(plan.missing()))
        while queue.complete and (more := list(plan.beyond())):
            queue.work(more)
    if queue.failed:
        raise SystemExit(f"{queue.failed} runs failed: see the errors above")
    if not queue.complete:
        print("Out of time; the same command goes on from here.")


def starting(study: Study, queue: "Queue", stack: int) -> Setting:
    """Train the weights that the study starts from on Python's sources, where they are missing; its setting with them
    named.
    """
    text = load_text(None).name
    optimizer, setting = resolve(*adamw()), replace(study.setting, steps=PRETRAINING_STEPS)
    start = f"{study.setting.shape}, {setting.steps} x {setting.batch} windows of {text}"
    runs = [Run(optimizer, PRETRAINING_LR, seed, setting, text) for seed in range(study.seeds)]
    runs = [run for run in runs if not weights_file(queue.place.weights, start, run.seed).exists()]
    queue.work([runs[first : first + stack] for first in range(0, len(runs), stack)], save=start)
    return replace(study.setting, start=start)


def weights_file(folder: Path, start: str, seed: int) -> Path:
    return folder / f"{hashlib.sha256(start.encode()).hexdigest()[:8]}-seed{seed}.pt"


@dataclass(frozen=True)
class Place:
    """What a worker must know beside its runs."""

    device: Device
    data: Path | None
    weights: Path
    deadline: float


class Queue:
    """Hands groups of runs to the workers, and begins none that would not end before the deadline."""

    def __init__(
        self, pool: ProcessPoolExecutor, store: Store, place: Place, jobs: int, session: dict[str, str]
    ) -> None:
        self.pool, self.store, self.place, self.jobs, self.session = pool, store, place, jobs, session
        self.complete, self.failed, self.latest = True, 0, 0.0

    def work(self, groups: list[list[Run]], save: str | None = None) -> None:
        """Train groups of runs, and keep their results, or under the name ``save`` their weights. Once time has run
        out or a run has failed, ``complete`` is False and no more groups are begun in another call.
        """
        waiting, done = list(reversed(groups if self.complete else [])), 0
        running: dict[Future[list[dict[str, Any]] | None], tuple[list[Run], float]] = {}
        while running or (waiting and self._fits()):
            while waiting and len(running) < self.jobs and self._fits():
                group = waiting.pop()
                running[self.pool.submit(work, group, self.place, save)] = group, time.time()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                group, since = running.pop(future)
                self.latest = time.time() - since
                done += self._finish(group, future, save)
                print(f"{len(groups) - done} of {len(groups)} groups of runs to go", flush=True)
        self.complete = self.complete and done == len(groups)

    def _finish(self, group: list[Run], future: "Future[list[dict[str, Any]] | None]", save: str | None) -> bool:
        try:
            results = future.result()
        except Exception:  # the other runs are worth having
            traceback.print_exc()
            self.failed += len(group)
            return False
        for run, result in zip(group, results or (), strict=False):
            if save is None:
                self.store.add(run, result, self.session)
            print(describe(run, result), flush=True)
        return results is not None

    def _fits(self) -> bool:
        return time.time() + 1.2 * self.latest < self.place.deadline


def load_text(data: Path | None) -> Text:
    if data not in _text:
        _text[data] = read_text(data)
    return _text[data]


def work(group: list[Run], place: Place, save: str | None) -> list[dict[str, Any]] | None:
    """In a worker: train one group of runs."""
    start = group[0].setting.start
    if save is not None:
        place.weights.mkdir(parents=True, exist_ok=True)
    return train(
        group,
        load_text(None if save else place.data),
        place.device,
        place.deadline,
        start=[weights_file(place.weights, start, run.seed) for run in group] if start else None,
        save=[weights_file(place.weights, save, run.seed) for run in group] if save else None,
    )


def describe(run: Run, result: dict[str, Any]) -> str:
    usual = resolve(run.optimizer["kind"], {})
    changed = {key: value for key, value in run.optimizer.items() if usual.get(key) != value}
    loss = "diverged" if result["diverged"] else f"{result['val_loss']:.4f}"
    return f"{run.optimizer['kind']} {changed} lr {run.lr:g} seed {run.seed}: {loss} in {result['seconds']:.1f} s"
