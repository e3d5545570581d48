"""Work on several processes of this machine, each with a GPU of its own (NCCL) or on CPUs (gloo)."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

_PATIENCE = timedelta(minutes=5)
"""Time that a collective may wait for other processes."""


def run_on(processes: int, device: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on several processes, which end afterwards.

    Args:
        processes: Number of processes.
        device: ``"cuda"`` or ``"cpu"``.
        work: Function of a module, whose result JSON can hold.
        arguments: Its arguments, which are pickled.

    Returns:
        The result on the first process.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_process, (processes, device, folder, work, arguments), processes)
        return json.loads((Path(folder) / "result.json").read_text())


def _process(
    rank: int, processes: int, device: str, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # as launchers set them, for Lightning
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        f"file://{folder}/store",
        _PATIENCE,
        rank=rank,
        world_size=processes,
        device_id=torch.device("cuda", rank) if on_gpu else None,
    )
    result = work(*arguments)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down


def over_processes(value: Any) -> list[Any]:
    """Gather an object of every process, in order of their ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
