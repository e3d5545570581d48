"""Commands in processes that are forked from one that has imported what takes each some six seconds.

Where there are GPUs they start anew: a process that has looked for them cannot be forked into one that uses them.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path

import torch

import lightning_adapm

HELPERS = Path(__file__).parent
PATHS = [str(path) for path in (Path(lightning_adapm.__file__).parents[1], HELPERS, HELPERS.parent / "distributed")]
FORKED = not torch.cuda.is_available()
CONTEXT = multiprocessing.get_context("forkserver" if FORKED else "spawn")
READ_ON_IMPORT = ("HF_", "TORCHDYNAMO_DISABLE")
"""Beginnings of variables that modules read when they are imported."""


def ensure_server():
    """Start the process that others are forked from; it finds modules by its own environment only."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [before.get("PYTHONPATH")])])
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # which asks the package index
    try:
        CONTEXT.set_forkserver_preload(["lightning_adapm.trainer.cli", "litgpt.__main__", "jobs", "strategies"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def become(words, env, output, errors=None, folder=None):
    """Become the command ``words``, a script or a module and its arguments, with its environment and its output."""
    os.environ.clear()
    os.environ.update(env)
    for number, path in ((1, output), (2, errors or output)):
        with path.open("a") as file:
            os.dup2(file.fileno(), number)
    if folder is not None:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
    sys.argv = list(words)
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def completed(words, folder, env, timeout, fresh=False, stdin=None):
    """What a module or a script and its arguments said in ``folder``, as ``subprocess.run`` returns it.

    ``fresh`` processes import everything anew; those with text for their standard input do, too.
    """
    words = list(map(str, words))
    if fresh or stdin is not None or not FORKED:
        command = [sys.executable, *([] if words[0].endswith(".py") else ["-m"]), *words]
        options = {"capture_output": True, "text": True, "timeout": timeout, "check": False, "input": stdin}
        return subprocess.run(command, cwd=folder, env=env, **options)
    ensure_server()
    with tempfile.TemporaryDirectory() as said:
        output, errors = Path(said) / "output", Path(said) / "errors"
        output.touch()
        errors.touch()
        process = CONTEXT.Process(target=become, args=(words, env, output, errors, folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, output.read_text(), errors.read_text())
        return subprocess.CompletedProcess(words, process.exitcode, output.read_text(), errors.read_text())
