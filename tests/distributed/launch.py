"""Starts real processes that run a script of this folder, with a time limit.

They are forked from a process that has imported torch, Lightning and litgpt, which takes each some six seconds. Where
there are GPUs they start anew: a process that has looked for them cannot be forked into one that uses them.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path

import torch

import lightning_adapm

FOLDER = Path(__file__).parent
PATHS = [str(Path(lightning_adapm.__file__).parents[1]), str(FOLDER.parent / "helpers"), str(FOLDER)]
FORKED = not torch.cuda.is_available()
CONTEXT = multiprocessing.get_context("forkserver" if FORKED else "spawn")


def run_processes(script, world_size, *words, timeout=600):
    """``script word...`` on ``world_size`` processes that find each other by the file named in ``STORE``, or by port.

    An error on one process would let the others wait: they are ended, and what all of them said is the error.
    """
    with started(script, world_size, *words) as (processes, outputs):
        codes = _wait(processes, timeout)
        if any(codes):
            said = "\n".join(f"--- process {rank}\n{output.read_text()[-6000:]}" for rank, output in enumerate(outputs))
            raise AssertionError(f"{script} {' '.join(map(str, words))}: exit codes {codes}\n{said}")


@contextmanager
def started(script, world_size, *words):
    """The processes and the files that they write to; ended, if they still run, when the context is left."""
    if FORKED:
        _ensure_server()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        outputs = [Path(folder) / f"{rank}.txt" for rank in range(world_size)]
        processes = []
        try:
            for rank, output in enumerate(outputs):
                output.touch()
                env = os.environ | {
                    "OMP_NUM_THREADS": "1",
                    "STORE": f"{folder}/store",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_RANK": str(rank),
                }
                command = [str(FOLDER / script), *map(str, words)]
                processes.append(CONTEXT.Process(target=_run, args=(command, env, output)))
                processes[-1].start()
            yield processes, outputs
        finally:
            for process in processes:
                process.kill()
                process.join()


def _ensure_server():
    """Start the process that others are forked from; it finds modules by its own environment only."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [before])])
    try:
        CONTEXT.set_forkserver_preload(["jobs", "strategies"])
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(command, env, output):
    """Become ``command``: its arguments, its environment, its output."""
    os.environ.clear()
    os.environ.update(env)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _wait(processes, timeout):
    """Exit codes, once all have ended or one has failed."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.exitcode for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.05)
    return [process.exitcode for process in processes]
