"""Starts real processes that run a script of this folder, with a time limit."""

import os
import socket
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from forked import CONTEXT, FORKED, become, ensure_server

FOLDER = Path(__file__).parent


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
        ensure_server()
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
                processes.append(CONTEXT.Process(target=become, args=(command, env, output)))
                processes[-1].start()
            yield processes, outputs
        finally:
            for process in processes:
                process.kill()
                process.join()


def _wait(processes, timeout):
    """Exit codes, once all have ended or one has failed."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        codes = [process.exitcode for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.05)
    return [process.exitcode for process in processes]
