"""Pictures of the docs: those shown are those drawn, and their figures are the results'."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import drawings, loss_and_bytes
from benchmarks.pages.page import RESULTS
from benchmarks.pages.table import plotting

HOW_IT_WORKS = Path(__file__).parents[2] / "docs" / "how-it-works.md"


def test_the_page_shows_the_drawings():
    shown = re.findall(r"\]\(pictures/(\w+)\.svg\)", HOW_IT_WORKS.read_text())
    assert sorted(shown) == sorted(drawings.DRAWINGS)
    assert all((drawings.PICTURES / f"{name}.svg").is_file() for name in shown)


@pytest.mark.parametrize("name", ["payment", "orthogonalization"])
def test_a_drawing_has_curves(name):
    (axes,) = drawings.DRAWINGS[name](plotting()).axes
    assert all(len(line.get_xdata()) > 30 for line in axes.lines)


def test_the_picture_of_losses_and_bytes_is_that_of_the_results(monkeypatch):
    """Or run: python -m benchmarks.loss_and_bytes. Bytes need every peer, and are left out."""
    monkeypatch.setattr(loss_and_bytes, "relative_state", lambda study, label: 0.0)
    monkeypatch.setattr(loss_and_bytes, "missing", lambda kind: None)
    drawn = json.loads((RESULTS / "loss_and_bytes.json").read_text())["panels"]
    assert list(drawn) == list(loss_and_bytes.PANELS)
    for title, names in loss_and_bytes.PANELS.items():
        found = [(point.label, point.lr, point.difference, point.error) for point in loss_and_bytes.points(names)]
        assert found == [(row["label"], row["lr"], row["difference"], row["error"]) for row in drawn[title]]


def test_labels_of_points_at_one_height_are_apart():
    other = {"study": "", "ours": True, "lr": 1.0, "highest": False, "seeds": 1, "error": None}
    points = [
        loss_and_bytes.Point(label=label, difference=height, state=state, **other)
        for label, height, state in (("a", 0.0, 0.5), ("b", 0.0, 0.5), ("c", 1.0, 0.5), ("d", 0.0, 0.1))
    ]
    assert loss_and_bytes.label_heights(points) == {"a": 0.0, "b": 0.04, "c": 1.0, "d": 0.0}
