"""What a step holds on the device: no copy of a matrix, and what was planned."""

import pytest
import torch
import yaml
from on_gpu import NEEDED, compact
from torch import nn

from lightning_adapm.report.diagnostics import ResidualProbe
from lightning_adapm.report.tables import read_bytes

pytestmark = NEEDED


def test_first_steps_refreshes_and_monitors_hold_no_matrix():
    """Above the second step, which does none of it; the matrix takes 512 MiB in float32."""
    weight = nn.Parameter(torch.randn(65536, 2048, device="cuda", dtype=torch.bfloat16))
    optimizer = compact([("lm_head.weight", weight)], rank=16, update_proj_gap=2, second_moment="factored")
    optimizer._make_state(weight)
    peaks = {}
    for name, probe in {"first": None, "plain": None, "refresh": None, "watched": ResidualProbe()}.items():
        weight.grad, optimizer.observer = torch.randn_like(weight), probe
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        optimizer.step()
        peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
    assert all(peak - peaks["plain"] < 160 for peak in peaks.values()), peaks


def test_a_step_is_planned_within_five_percent_of_the_allocator(tmp_path):
    """Llama-3.2-1B with the memory options of the recipes for small cards; weights are drawn at random."""
    pytest.importorskip("jsonargparse", reason="recipes are read by it")
    from benchmarks import recipe_memory, recipe_training

    recipe = yaml.safe_load((recipe_memory.RECIPES / "trainer/finetune/llama-3.2-3b-full-12gb.yaml").read_text())
    recipe["model"]["init_args"]["model_name"] = "Llama-3.2-1B"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    planned = read_bytes("".join(recipe_memory.planned_step(path).split()[:2]))
    assert recipe_training.measure(path)["peak"] == pytest.approx(planned, rel=0.05)
