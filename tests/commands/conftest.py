"""The command that most of these tests call."""

import re

import pytest

from lightning_adapm.__main__ import main


@pytest.fixture
def plan(capsys):
    """Status, what is printed, and the totals of each column as they are printed."""

    def call(*words):
        with pytest.raises(SystemExit) as end:
            main(["plan", *map(str, words)])
        printed = capsys.readouterr()
        (total,) = re.findall(r"^  total +(\d.*B) *$", printed.out, re.M)[:1] or [""]
        totals = dict(zip(("AdamW", "Adam-mini", "AdaPM", "AdaPM factored"), re.split(r" {2,}", total), strict=False))
        return end.value.code, printed.out, printed.err, totals

    return call
