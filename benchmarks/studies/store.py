"""Results on disk: one JSON file per study, a line per run, which other studies read as well."""

import hashlib
import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lightning_adapm
from benchmarks.studies.setting import Run
from lightning_adapm.step import loops


class Entry(NamedTuple):
    """One result: of which run, and what it was made with (command, date, hardware, versions)."""

    run: dict[str, Any]
    result: dict[str, Any]
    session: dict[str, str]


class Store:
    """The runs of one study's file, and those of the other files in its folder. Additions are written at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.own: dict[str, Entry] = {}
        self.known: dict[str, Entry] = {}
        for file in sorted(path.parent.glob("*.json")):
            found = read(file)
            self.known |= found
            if file == path:
                self.own = found
        self.known |= self.own

    def __contains__(self, run: Run) -> bool:
        return run.key in self.known

    def __getitem__(self, run: Run) -> dict[str, Any]:
        return self.known[run.key].result

    def add(self, run: Run, result: dict[str, Any], session: dict[str, str]) -> None:
        self.own[run.key] = self.known[run.key] = Entry(json.loads(run.key), result, session)
        self._write()

    def merge(self, file: Path) -> int:
        """Add the runs of another machine's file of this study; returns the number of those that are new."""
        new = {key: entry for key, entry in read(file).items() if key not in self.known}
        self.own |= new
        self.known |= new
        if new:
            self._write()
        return len(new)

    def _write(self) -> None:
        sessions: list[dict[str, str]] = []
        lines = []
        for entry in self.own.values():
            if entry.session not in sessions:
                sessions.append(entry.session)
            line = {"run": entry.run, "result": entry.result, "session": sessions.index(entry.session)}
            lines.append(json.dumps(line, separators=(",", ":")))
        header = ",\n".join(map(json.dumps, sessions))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        body = ",\n".join(lines)
        unfinished.write_text(f'{{"sessions":[\n{header}\n],\n"runs":[\n{body}\n]}}\n')
        unfinished.replace(self.path)  # in one move: whoever is killed meanwhile loses nothing


def read(file: Path) -> dict[str, Entry]:
    """The results in a file; none in one that is not a study's."""
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or "sessions" not in content:
        return {}
    return {
        json.dumps(line["run"], sort_keys=True): Entry(
            line["run"], line["result"], content["sessions"][line["session"]]
        )
        for line in content["runs"]
    }


FILES = ("--data", "--pretrain-on", "--weights", "--vocabulary")
"""Options whose files may be anywhere."""


def command_line(program: str, words: Sequence[str]) -> str:
    """Command of a measurement, as others repeat it: without ``--output``, and with :data:`FILES` by their names."""
    kept = [program]
    for before, word in zip(("", *words), words, strict=False):
        if "--output" not in (before, word):
            kept.append(shlex.quote(Path(word).name if before in FILES else word))
    return " ".join(kept)


def hardware(device: str) -> str:
    """The processor that trained, in words."""
    cpu = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), cpu)
    cores = f"{os.cpu_count()} cores of {cpu}"
    if device != "cuda":
        return cores
    count = torch.cuda.device_count()
    return f"{f'{count} x ' if count > 1 else ''}{torch.cuda.get_device_name()}, {cores}"


def versions() -> str:
    """Versions of the packages that results depend on, with a digest of this package's sources."""
    folder = Path(lightning_adapm.__file__).parent
    sources = b"".join(file.read_bytes() for file in sorted(folder.rglob("*.py")))
    digest = hashlib.sha256(sources).hexdigest()[:8]
    numba = f"numba {version('numba')}, " if loops.runs_on(torch.device("cpu")) else ""  # whose loops round otherwise
    return f"Python {platform.python_version()}, torch {torch.__version__}, {numba}lightning-adapm sources {digest}"
