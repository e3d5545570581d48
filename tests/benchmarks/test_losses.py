"""Tables of losses in the documentation."""

import json

import pytest

from benchmarks.pages import losses
from benchmarks.pages.table import Cell, edge_of


def test_a_table_of_losses_says_what_is_against_a_row_and_what_is_not_known(tmp_path):
    first, second, *_ = losses.MODELS
    point = {"difference": -0.0141, "error": 0.0105, "seeds": 3, "edge": "", "state": 0.0963}
    panels = {
        first: [{**point, "label": "AdaPM factored"}, {**point, "label": "unknown"}],
        second: [
            {**point, "label": "AdaPM factored", "state": 0.058},
            {
                **point,
                "label": "PartialMuon, compact",
                "difference": 0.02,
                "error": None,
                "seeds": 1,
                "edge": "the lowest tried",
            },
        ],
    }
    (tmp_path / "loss_and_bytes.json").write_text(json.dumps({"panels": panels}))
    step = {"rows": {"AdamW, fused": {"mean_ms": 10.0}, "PartialMuon, compact": {"mean_ms": 43.0}}}
    (tmp_path / f"{losses.FORMER}.json").write_text(json.dumps({**step, "hardware": "GPU, 2 cores"}))
    (tmp_path / f"{losses.DEFAULTS}.json").write_text(json.dumps({"rows": {}, "hardware": "GPU, 4 cores"}))
    both = "0.014 ± 0.011 lower (3)"
    assert losses.section("all losses", tmp_path).splitlines()[2:] == [
        f'| `AdaPM(second_moment="factored")` | {both} | {both} | not run | not run | 9.6 and 5.8 % |  |',
        "| compact, with Muon's steps | not run | **0.020 higher** (1) * | not run | not run | 9.6 % | **4.3 times** |",
    ]
    (tmp_path / f"{losses.DEFAULTS}.json").write_text(json.dumps({"rows": {}, "hardware": "another GPU, 4 cores"}))
    assert "times" not in losses.section("all losses", tmp_path)


@pytest.mark.parametrize(
    ("tried", "words"),
    [
        ({1: [0.5, 0.3]}, ""),
        ({1: [0.5, 0.3], 2: [0.6]}, "the lowest tried"),
        ({1: [0.4], 2: [0.5, 0.2], 4: [0.6]}, "none worse below"),
        ({1: [0.6], 2: [0.5, 0.7], 4: [0.4]}, "none worse above"),
        ({1: [0.6], 2: [0.5, 0.3], 4: [0.6]}, ""),
    ],
)
def test_a_rate_is_the_best_between_worse_ones_of_the_same_seeds(tried, words):
    def result(loss):
        return {"val_loss": loss, "diverged": False}

    cells = {lr: Cell(dict(enumerate(map(result, losses)))) for lr, losses in tried.items()}
    assert edge_of(cells) == words
