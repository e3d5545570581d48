"""Kernels of a CUDA step, interpreted on a CPU."""

import importlib
import os
from functools import partial

import pytest
import torch

from lightning_adapm.sharding.layout import Layout
from lightning_adapm.sharding.owners import Exchange, Owners
from lightning_adapm.step import kernels

KERNELS = [
    *"read sum_squares combine sketch advance weigh factor relate move".split(),
    *"bound direct norms scales rescale symmetric".split(),
]
SCALARS = "one count largest tiny beta1 beta2 correction flush scale eps lr decay clip step share alpha".split()


@pytest.fixture
def interpreted(monkeypatch):
    """Triton's kernels run on a CPU as well; gives back the names of those that were launched.

    Of their arguments, all that options decide are floats: what is compiled for one cannot be launched with an int.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("on a CUDA device tests/gpu runs the kernels themselves")
    triton_kernels = importlib.import_module("lightning_adapm.step.triton_kernels")
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(kernels, "FACTOR", torch.float32)  # the interpreter cannot multiply bfloat16
    launched = []

    def counted(name):
        kernel = getattr(triton_kernels, name)

        class Counted:
            def __getitem__(self, grid):
                launched.append(name)
                return partial(self.run, kernel[grid])

            @staticmethod
            def run(run, *arguments, **constants):
                for argument, value in zip(kernel.arg_names, arguments, strict=False):
                    assert argument not in SCALARS or type(value) is float, (name, argument, value)
                return run(*arguments, **constants)

        return Counted()

    for name in KERNELS:
        monkeypatch.setattr(triton_kernels, name, counted(name))
    return launched


class Done:
    """A collective that has been waited for."""

    def wait(self):
        pass


@pytest.fixture
def hold_all_rows(monkeypatch):
    """Call this to share parameters with another process, which holds no row, so that sums are complete here.

    It is given no matrix either. With ``others`` it holds rows like those here, and sums count them. Returns where the
    numbers of elements of what is exchanged are listed.
    """
    exchanged = []

    def layout(others, param):
        shape, held = param.shape, param.numel()
        whole = torch.Size(((1 + others) * shape[0], *shape[1:]))
        return Layout(whole, ((0, held), (held, (1 + others) * held)), 0, "both", "a mesh")

    def all_reduce(others, tensor, op, group, async_op=False):
        exchanged.append(tensor.numel())
        tensor *= 1 + others
        return Done()

    def all_to_all(received, sent, taken, given, group, async_op):
        exchanged.append(sent.numel())
        received.copy_(sent)
        return Done()

    def exchanges(owners):
        number = len(owners._shards)
        return [Exchange([range(number), range(number, number)], slice(0, number))]

    def share(others=False):
        monkeypatch.setattr("lightning_adapm.step.parts.layout_of", partial(layout, others))
        monkeypatch.setattr("torch.distributed.all_reduce", partial(all_reduce, others))
        monkeypatch.setattr("torch.distributed.all_to_all_single", all_to_all)
        monkeypatch.setattr(Owners, "_exchanges", property(exchanges))
        return exchanged

    return share
