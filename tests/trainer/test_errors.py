"""Errors of the parser in one line: the option, what was found, what to write instead."""

from argparse import ArgumentError
from typing import Any, Literal

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger

import lightning_adapm
from lightning_adapm.trainer.errors import CommandParser, one_line

assert lightning_adapm.AdaPM  # a subclass of Optimizer only when it is imported


@pytest.fixture(scope="module")
def parser():
    """Arguments of the types that options of ``fit`` have."""
    made = CommandParser()
    made.add_argument("--optimizer", type=torch.optim.Optimizer | None)
    made.add_argument("--callbacks", type=list[L.Callback] | L.Callback | None)
    made.add_argument("--logger", type=Logger | bool | None)
    made.add_argument("--precision", type=Literal["16-mixed", "bf16-mixed"] | None)
    made.add_argument("--rank", type=int | float)
    made.add_argument("--settings", type=dict[str, Any] | None)
    made.add_argument("--steps", type=int)
    made.add_argument("--lr", type=int, required=True)
    return made


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--optimizer=AdaPMM", "optimizer: there is no class 'AdaPMM'; did you mean 'lightning_adapm.AdaPM'?"),
        (
            "--optimizer=lightning_adapm.Adapm",
            "optimizer: there is no class 'lightning_adapm.Adapm'; did you mean 'AdaPM'?",
        ),
        (
            "--optimizer=lightning_adapm.optim.adapmm.AdaPM",
            "optimizer: there is no class 'lightning_adapm.optim.adapmm.AdaPM';"
            " module 'lightning_adapm.optim' has no attribute 'adapmm'",
        ),
        (
            "--optimizer=lightning_adapm.AdaPM --optimizer.rnk=3",
            "optimizer: lightning_adapm.AdaPM has no option 'rnk'; did you mean 'rank'?",
        ),
        (
            "--optimizer=lightning_adapm.AdaPM --optimizer.rank=many",
            "optimizer: lightning_adapm.AdaPM: rank must be an int or a float, but got 'many'",
        ),
        (
            "--optimizer=lightning_adapm.PartialMuon --optimizer.lr=high",
            "optimizer: lightning_adapm.PartialMuon: lr must be a float, but got 'high'",
        ),
        (
            "--optimizer=torch.nn.Linear",
            "optimizer must be a class path of Optimizer or null, but got 'torch.nn.Linear'",
        ),
        (
            "--callbacks+=lightning_adapm.OptimizerStateMonitr",
            "callbacks: there is no class 'lightning_adapm.OptimizerStateMonitr';"
            " did you mean 'OptimizerStateMonitor'?",
        ),
        (
            "--callbacks+=lightning_adapm.OptimizerStateMonitor --callbacks.every_n_step=5",
            "callbacks: lightning_adapm.OptimizerStateMonitor has no option 'every_n_step';"
            " did you mean 'every_n_steps'?",
        ),
        (
            "--logger=CSVLoger",
            "logger: there is no class 'CSVLoger'; did you mean 'lightning.pytorch.loggers.CSVLogger'?",
        ),
        (
            "--precision=bf17-mixed",
            "precision must be 16-mixed, bf16-mixed or null, but got 'bf17-mixed'; did you mean 'bf16-mixed'?",
        ),
        ("--rank=many", "rank must be an int or a float, but got 'many'"),
        ("--settings=3", "settings must be a mapping or null, but got '3'"),
        ("--steps=ten", "steps must be an int, but got 'ten'"),
        ("--step=ten --lr=3", "steps must be an int, but got 'ten'"),
        ("--stebs=3 --lr=3", "Unrecognized arguments: --stebs=3; did you mean --steps?"),
        ("--zzz --lr=3", "Unrecognized arguments: --zzz; -h lists all options"),
        ("", "lr is needed, and not given"),
    ],
)
def test_one_line(parser, words, line):
    with pytest.raises(ArgumentError) as error:
        parser.parse_args(words.split())
    assert one_line(error.value) == line


def test_an_argument_that_a_class_refuses_when_it_is_built(parser):
    words = "--callbacks+=lightning_adapm.OptimizerStateMonitor --callbacks.every_n_steps=0 --lr=3".split()
    with pytest.raises(ValueError) as error:
        parser.instantiate_classes(parser.parse_args(words))
    assert one_line(error.value) == "every_n_steps must be an int >= 1, but got 0"


def test_a_logger_that_is_not_installed():
    text = """Parser key "logger":
  Problem with given class_path 'loggers.TensorBoardLogger':
    Neither `tensorboard` nor `tensorboardX` is available. Try `pip install`ing either."""
    needed = "logger: loggers.TensorBoardLogger needs tensorboard: pip install 'lightning-adapm[tensorboard]'"
    assert one_line(ArgumentError(None, text)) == needed


def test_a_checkpoint_of_another_model():
    with pytest.raises(RuntimeError) as error:
        torch.nn.Linear(2, 3).load_state_dict({"weight": torch.zeros(3, 4)})
    assert one_line(error.value) == (
        '`ckpt_path` has the weights of another model than `model`: Missing key(s) in state_dict: "bias"., and 1 more'
        " mismatches; give the `model` of that run"
    )
