"""The walk of docs/extending.md through a step: its calls are made in this order, and it needs few types."""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from commands import REPOSITORY
from torch import nn

import lightning_adapm
from lightning_adapm import AdaPM

ROW = re.compile(r"^\| `(?:(\w+)\.)?(\w+)` \|(?: \[`.*?`\]\(\.\./(.*?)\))? \| (?!\[)", re.M)


PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
STEP, _, REST = PAGE.partition("A state dict of sharded parameters")
STATE_DICTS, _, PROCESSES = REST.partition("## Where processes change the arithmetic")


def walk():
    """Functions that the page names, each with its class, if any, and its file."""
    file, found = "", []
    for owner, name, stated in ROW.findall(STEP):
        file = stated or file
        found.append((owner, name, file))
    return found


def module_of(file):
    return import_module(file.removesuffix(".py").replace("/", "."))


@pytest.fixture(scope="module")
def frames():
    """What an ordinary step of one matrix calls: code, and the object or class that it is called with."""
    weight = nn.Parameter(torch.randn(8, 8))
    optimizer = AdaPM([("up_proj.weight", weight)])
    calls = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call":
            first = code.co_varnames[0] if code.co_argcount else ""
            calls.append((code, frame.f_locals[first] if first in ("self", "cls", "_cls") else None))

    for last in (False, False, True):
        weight.grad = torch.randn(8, 8)
        sys.setprofile(note if last else None)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
    return calls


def ours(kind):
    return kind.__module__.split(".")[0] == lightning_adapm.__name__


def test_a_step_makes_the_calls_of_the_page(frames):
    made = iter([(code.co_name, Path(code.co_filename)) for code, _ in frames])
    expected = [(name, REPOSITORY / file) for _, name, file in walk()]
    assert len(expected) == 11 and len({file for _, file in expected}) == 5
    assert [each for each in expected if each not in made] == []


def types_in(hint):
    if isinstance(hint, type):
        return {hint} if ours(hint) else set()
    arguments = [each for some in get_args(hint) for each in (some if isinstance(some, list) else [some])]
    return set().union(*map(types_in, arguments))


def test_the_page_lists_the_types_in_the_signatures_of_these_calls():
    met = set()
    for owner, name, file in walk():
        module = module_of(file)
        kind = getattr(module, owner, None)
        hints = get_type_hints(inspect.unwrap(getattr(kind or module, name)))
        met |= set().union({kind} - {None}, *map(types_in, hints.values()))
    cells = re.findall(r"^\| (`.*?) \|", STEP.split("Their signatures use these types")[1], re.M)
    assert sorted(kind.__name__ for kind in met) == sorted(re.findall(r"`(\w+)`", " ".join(cells)))
    assert len(met) == 14


def test_a_step_runs_the_methods_of_few_types(frames):
    """Of the classes that define them; a named tuple counts where one is made."""
    ran = set()
    for code, first in frames:
        kind = first if isinstance(first, type) else type(first)
        made, file = code.co_varnames[:1] == ("_cls",), Path(code.co_filename)
        found = [each for each in kind.__mro__ if ours(each) and (made or code.co_name in vars(each))]
        ran |= {each for each in found[:1] if made or file.match(each.__module__.replace(".", "/") + ".py")}
    assert len(ran) <= 18, sorted(kind.__qualname__ for kind in ran)


def stated_calls(table):
    """Calls in the rows of a table that names their files, each with the module of its file."""
    file = ""
    for row in re.findall(r"^\| (?!saving|call|---)(.*) \|$", table, re.M):
        file = (re.search(r"^.*\(\.\./(.*?\.py)\)", row) or [None, file])[1]  # the last one: a cell may name another
        for owner, name in re.findall(r"`(?:(\w+)\.)?(\w+)`", row):
            yield owner, name, module_of(file)


@pytest.mark.parametrize(("table", "number"), [(STATE_DICTS, 8), (PROCESSES, 11)], ids=["state dicts", "processes"])
def test_calls_are_where_the_page_says(table, number):
    found = set()
    for owner, name, module in stated_calls(table):
        called = getattr(getattr(module, owner) if owner else module, name)
        assert called.__module__ == module.__name__, name
        found.add((owner, name))
    assert len(found) == number
