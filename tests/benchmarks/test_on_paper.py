"""The step time that is computed for many GPUs."""

import pytest

from benchmarks.step_time_on_paper import GPUS, MEASURED, SHAPES, Links, page, planned, rates, row


def test_shapes_are_those_of_the_models():
    counts = {"llama-3-8b": 8.030e9, "llama-3-70b": 70.554e9, "llama-3.1-405b": 405.85e9}
    assert counts.keys() | {MEASURED} == SHAPES.keys()
    for model in counts:
        assert sum(param.numel() for param in planned(model).pieces) == pytest.approx(counts[model], rel=1e-4)


def test_rows_and_page():
    """What is divided among GPUs shrinks with them, and nothing else does."""
    measured, links = rates(), Links()
    rows = [row("llama-3-8b", gpus, measured, links) for gpus in GPUS]
    first, *_, last = rows
    share = GPUS[0] / GPUS[-1]
    for key in ("state", "adamw_state", "adamw"):
        assert last[key] == pytest.approx(share * first[key], rel=0.01)
    assert share * first["kernels"] < last["kernels"] < first["kernels"]
    assert first["exchange"] < last["exchange"] < 0.05 * last["gradients"]
    made = {"date": "d", "hardware": "h", "versions": "v", "command": "c", "rows": rows}
    made |= {"measured_model": first, "measured_ms": 1.0}
    text = page(made | {"rates": measured._asdict(), "links": vars(links)})
    assert "| llama-3-8b | 1,024 |" in text and "only for llama-3-8b on 8 GPUs." in text


def test_the_arithmetic_gives_what_was_measured_on_one_gpu_and_nearly_that_on_two():
    """On one, from which it has its rates, without links; on two, steps took 4.8 ms."""
    measured, links = rates(), Links(latency=0.0, inside=float("inf"))
    one = row(MEASURED, 1, measured, links)
    assert 1e3 * (one["kernels"] + one["exchange"]) == pytest.approx(8.165, rel=1e-3)
    assert 1e3 * one["adamw"] == pytest.approx(13.02, rel=1e-3)
    two = row(MEASURED, 2, measured, Links())
    assert 1e3 * (two["kernels"] + two["exchange"]) == pytest.approx(4.82, rel=0.15)


def test_collectives_take_their_latency():
    links = Links()
    assert links.seconds(0, 10, 16) == pytest.approx(10 * links.latency)
    assert links.seconds(links.between, 0, 16) == pytest.approx(1.0)
    assert links.seconds(links.inside, 0, 8) == pytest.approx(1.0)
