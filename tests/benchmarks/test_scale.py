"""SCALE as its paper has it, and packages whose imports are not all needed."""

import dataclasses
import sys

import pytest
import torch

from benchmarks.studies.decoder import Shape
from benchmarks.studies.optimizers import Library, Parameters, UnavailableError, build, load

LLAMA = Shape(layers=1, width=8, n_head=2, context=8, vocab=12, llama=True)
LR, DECAY, MOMENTUM = 0.05, 0.1, 0.9


@pytest.mark.parametrize("llama", [True, False])
def test_a_step_is_that_of_the_formula(llama):
    """Every column has the norm ``lr * sqrt(rows)``: of a linear layer an output's weights, of a table one feature."""
    torch.manual_seed(0)
    model = dataclasses.replace(LLAMA, llama=llama).build()
    of = Parameters.of(model)
    optimizer = build({"kind": "SCALE", "momentum": MOMENTUM}, of, LR)
    reference, wanted = {}, {name: param.detach().double().clone() for name, param in of.named}
    vectors = [param.detach().clone().requires_grad_() for param in of.tensors if param.dim() == 1]
    adamw = torch.optim.AdamW(vectors, lr=LR, weight_decay=DECAY)
    head = "lm_head.weight" if llama else "wte.weight"
    for _ in range(3):
        for param in of.tensors:
            param.grad = torch.randn_like(param)
        for copy, param in zip(vectors, (param for param in of.tensors if param.dim() == 1), strict=True):
            copy.grad = param.grad.clone()
        for name, param in of.named:
            if param.dim() == 1:
                continue
            used = param.grad.double()
            if name == head:
                used = reference[name] = MOMENTUM * reference.get(name, 0 * used) + (1 - MOMENTUM) * used
            dim = 0 if name != head and name in ("wte.weight", "wpe.weight") else 1
            length = used.norm(dim=dim, keepdim=True) / used.shape[dim] ** 0.5
            wanted[name] = (1 - LR * DECAY) * wanted[name] - LR * used / length
        optimizer.step()
        adamw.step()
    for name, param in of.named:
        if param.dim() == 2:
            torch.testing.assert_close(param.detach().double(), wanted[name], atol=1e-5, rtol=1e-5)
    for copy, param in zip(vectors, (param for param in of.tensors if param.dim() == 1), strict=True):
        torch.testing.assert_close(param, copy)
    kept = [tuple(state["exp_avg"].shape) for state in optimizer.state.values() if "exp_avg_sq" not in state]
    assert kept == [(12, 8)]


def test_what_a_library_imports_for_other_classes_need_not_be_there(tmp_path, monkeypatch):
    (tmp_path / "some_peer.py").write_text(
        "import torch\nfrom absent_package.optim.optimizer import Base\nimport absent_package.functional as F\n"
        "class EightBits(Base):\n    pass\nclass Full(torch.optim.SGD):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = ("absent_package", "absent_package.functional", "absent_package.optim", "absent_package.optim.optimizer")
    with pytest.raises(UnavailableError, match="absent_package"):
        load(Library("some_peer", "Full", "some-peer"))
    assert load(Library("some_peer", "Full", "some-peer", unused=names)).__mro__[1] is torch.optim.SGD
    assert not any(name.startswith("absent_package") for name in sys.modules)
    monkeypatch.delitem(sys.modules, "some_peer")
