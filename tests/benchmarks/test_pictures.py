"""Pictures of the docs: those shown are those drawn, and their figures are the results'."""

import json
import re
from dataclasses import asdict
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


def test_results_show_the_picture_that_the_readme_shows():
    shown = [name for page in RESULTS.glob("*.md") for name in re.findall(r"\]\(([^)]*\.svg)\)", page.read_text())]
    assert shown == ["loss_and_bytes.svg"]


@pytest.mark.parametrize("name", ["payment", "orthogonalization"])
def test_a_drawing_has_curves(name):
    (axes,) = drawings.DRAWINGS[name](plotting()).axes
    assert all(len(line.get_xdata()) > 30 for line in axes.lines)


def test_the_picture_of_losses_and_bytes_is_that_of_the_results(monkeypatch):
    """Or run: python -m benchmarks.loss_and_bytes. Bytes need every peer, and are left out."""
    monkeypatch.setattr(loss_and_bytes, "relative_state", lambda study, label: 0.0)
    monkeypatch.setattr(loss_and_bytes, "missing", lambda kind: None)
    drawn = json.loads((RESULTS / "loss_and_bytes.json").read_text())["panels"]
    found = {title: loss_and_bytes.points(names, {}) for title, names in loss_and_bytes.PANELS.items()}
    assert list(drawn) == [title for title, points in found.items() if points]
    for title, rows in drawn.items():
        points = [(point.label, point.lr, point.difference, point.error) for point in found[title]]
        assert points == [(row["label"], row["lr"], row["difference"], row["error"]) for row in rows]


def test_a_row_of_a_package_that_is_not_here_stays_where_its_state_is_known(monkeypatch):
    monkeypatch.setattr(loss_and_bytes, "missing", lambda kind: "absent")
    known = loss_and_bytes.counted_before(RESULTS / "loss_and_bytes.json")
    found = {point.label: point.state for point in loss_and_bytes.points(["convergence"], known)}
    assert 0.4 < found.pop("GaLore (galore-torch)") < 0.5 and found
    assert loss_and_bytes.points(["convergence"], {}) == []


def point(label, height, state, **options):
    others = {"study": "s", "lr": 1.0, "edge": "", "seeds": 1, "error": None, "optimizer": {}}
    return loss_and_bytes.Point(label=label, difference=height, state=state, **{**others, **options})


def test_labels_cover_neither_each_other_nor_points():
    points = [
        point("a", 0.0, 0.6),
        point("b", 0.0, 0.5),
        point("c", 1.0, 0.5),
        point("d", 0.0, 0.1),
        point("e", 1.0, 0.001),
    ]
    places = loss_and_bytes.label_places(points)
    assert [height for _, height in places] == [0.0, 0.04, 1.0, 0.0, 1.0]
    assert [x for x, _ in places] == pytest.approx([0.87 * 0.5, 0.87 * 0.5, 0.87 * 0.5, 0.87 * 0.1, 1.15 * 0.001])


def test_the_front_has_the_points_that_none_beats_in_loss_and_in_bytes():
    points = [point("a", 0.0, 1.0), point("b", -1.0, 0.5), point("c", 0.5, 0.1), point("d", 0.7, 0.2)]
    assert [each.label for each in loss_and_bytes.front(points)] == ["c", "b"]


def test_the_picture_shows_the_first_models_with_enough_rows():
    many = [point(str(index), 0.0, 1.0) for index in range(loss_and_bytes.ENOUGH)]
    panels = {"a": many, "b": many[:2], "c": [*many, point("AdaPM, more momentum", 0.0, 1.0)], "d": many}
    assert loss_and_bytes.chosen(panels) == {"a": many, "c": many}


def test_a_state_that_was_counted_is_not_counted_again(tmp_path):
    file = tmp_path / "loss_and_bytes.json"
    row = asdict(point("a", 0.0, 0.25, optimizer={"kind": "AdaPM", "rank": 0.1}))
    file.write_text(json.dumps({"panels": {"one": [row, {"study": "s", "state": 0.5}]}}))
    known = loss_and_bytes.counted_before(file)
    assert known == {loss_and_bytes.identity("s", {"rank": 0.1, "kind": "AdaPM"}): 0.25}
