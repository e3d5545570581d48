"""``lightning-adapm plan --fits SIZE``: whether a training step fits, and which recipes' steps do."""

import importlib.util
import re

from commands import QUICKSTART, RECIPES

from lightning_adapm.commands import plan as plan_command


def test_whether_a_step_fits(plan):
    words = ["--config", QUICKSTART, "--model.config.n_layer=2", "--fits"]
    status, out, _, _ = plan(*words, "1TiB")
    assert status == 0
    assert "A training step at its peak, as planned: " in out
    parts = dict(re.findall(r"^  (weights|gradients|state|activations|transients) +(\d.*B)$", out, re.M))
    assert len(parts) == 5 and "0 B" not in (parts["weights"], parts["state"], parts["activations"])
    assert re.search(r"^1.00 TiB: fits, .* are left$", out, re.M)
    status, out, _, _ = plan(*words, "1MiB")
    assert status == 1 and re.search(r"^1.0 MiB: does not fit, \d.* are missing$", out, re.M)
    assert out.endswith(" are missing\n")  # the weights alone are more
    more = "activation_checkpointing: true, lm_head_chunk_size: 128, a lower max_seq_length in model.init_args"
    assert more in plan(*words, "20MiB")[1]
    assert re.search(r"^It fits with micro-batches of 1: \d.* for 1 x 128 tokens$", plan(*words, "60MiB")[1], re.M)
    status, out, _, _ = plan("--model", "models.PlainLM", "--fits", "1GiB")
    assert (
        status == 0 and "activations are planned for LitGPTModule alone" in out and re.search(r"activations +0 B", out)
    )
    for size in ("much", "muchGiB"):
        assert "a size must be a number with KiB" in plan("--model", "models.PlainLM", f"--fits={size}")[0]


def test_whether_a_step_of_litgpts_own_commands_fits(plan):
    """They have settings of their own for micro-batches, and cannot update in backward."""
    words = ["--config", RECIPES / "litgpt" / "pretrain" / "quickstart.yaml", "--fits"]
    status, out, *_ = plan(*words, "1TiB")
    assert status == 0 and "at its peak, as planned: 8 x 256 tokens" in out
    whole = float(re.findall(r"^  total +([\d.]+) MiB$", out, re.M)[-1])
    status, out, *_ = plan(*words, f"{whole - 1}MiB")
    assert status == 1 and re.search("^It fits with micro-batches of 1: .* for 1 x 256 tokens$", out, re.M)


def test_a_mixture_of_experts_is_planned_without_activations(plan):
    fields = {
        "n_expert": 4,
        "n_expert_per_token": 2,
        "mlp_class_name": "LLaMAMoE",
        "intermediate_size": 32,
        "bias": False,
    }
    words = [f"--model.config.{name}={value}" for name, value in fields.items()]
    assert (
        "activations of a mixture of experts depend on the tokens"
        in plan("--model_name=pythia-14m", *words, "--fits=80GiB")[1]
    )


def test_recipes_that_fit(plan, monkeypatch):
    shipped = {name: QUICKSTART.with_stem(name) for name in ("quickstart", "quickstart-adamw")}
    monkeypatch.setattr(plan_command, "recipes", lambda: shipped)
    status, out, _, _ = plan("--fits", "40GiB")
    assert status == 0
    (row,) = [line for line in out.splitlines() if "quickstart" in line]
    assert "update_in_backward" not in row and row.split()[0] == "quickstart"

    def with_less(row):
        needed = float(re.search(r"([\d.]+) MiB$", row)[1])
        (found,) = [line for line in plan("--fits", f"{needed - 1}MiB")[1].splitlines() if "quickstart" in line]
        return found

    smaller = with_less(row)
    assert " 1 x 128 tokens   micro-batches of 1   " in smaller  # of the same step, which is the same training
    factored = with_less(smaller)
    assert "   micro-batches of 1, second_moment=factored   " in factored
    assert "update_in_backward, micro-batches of 1, second_moment=factored, state_dtype=int8" in with_less(factored)
    assert "quickstart" not in plan("--fits", "1MiB")[1]


def test_recipes_cannot_be_planned_without_litgpt(plan, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", {}.get)
    status, *_ = plan("--fits=24GiB")
    assert "--fits without a model plans the recipes: pip install 'lightning-adapm[litgpt]'" in status
