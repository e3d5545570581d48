"""The walk of docs/extending.md through a step: its calls are made, in this order."""

import re
import sys
from pathlib import Path

import torch
from commands import REPOSITORY
from torch import nn

from lightning_adapm import AdaPM

ROW = re.compile(r"^\| `(?:\w+\.)?(\w+)` \|(?: \[`.*?`\]\(\.\./(.*?)\))? \| (?!\[)", re.M)


def walk():
    """Functions that the page names, each with its file."""
    page = (REPOSITORY / "docs" / "extending.md").read_text().split("A state dict of")[0]
    file, found = "", []
    for name, stated in ROW.findall(page):
        file = stated or file
        found.append((name, file))
    return found


def test_a_step_makes_the_calls_of_the_page():
    weight = nn.Parameter(torch.ones(8, 8))
    weight.grad = torch.ones(8, 8)
    optimizer = AdaPM([("v_proj.weight", weight)])
    calls = []

    def note(frame, event, _):
        if event == "call":
            calls.append((frame.f_code.co_name, Path(frame.f_code.co_filename)))

    sys.setprofile(note)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    made = iter(calls)
    expected = [(name, REPOSITORY / file) for name, file in walk()]
    assert len(expected) == 11 and len({file for _, file in expected}) == 5
    assert [each for each in expected if each not in made] == []
