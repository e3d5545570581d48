"""The contract of ``torch.optim.Optimizer``: parameters of every shape, layout and dtype.

Nothing here is about what an optimizer computes. ``torch.optim.AdamW`` passes too, as the reference.
"""

import copy

import pytest
import torch
from contract import Net, equal, set_gradients, tensors_in, train, trained
from optimizers import REFERENCE
from torch import nn

pytestmark = [
    pytest.mark.filterwarnings("ignore:update_in_backward=True frees no gradient early"),
    pytest.mark.filterwarnings("ignore:.* found no gradient on any of its parameters"),
]


def strided(tensor):
    """The same numbers with gaps between them, the first dimension the fastest."""
    wide = torch.empty(*tensor.shape[::-1], 2, dtype=tensor.dtype)[..., 0].permute(*range(tensor.dim())[::-1])
    return wide.copy_(tensor)


@pytest.mark.parametrize("where", ["parameters", "gradients", "both"])
def test_strides_of_parameters_and_gradients(case, where):
    dense, model = Net(), Net()
    if where != "gradients":
        for param in model.parameters():
            param.data = strided(param.data)
    optimizers = case(dense.named_parameters()), case(model.named_parameters())
    for step in range(4):
        for each, optimizer in zip((dense, model), optimizers, strict=True):
            set_gradients(each, step)
            if each is model and where != "parameters":
                for param in model.parameters():
                    param.grad = strided(param.grad)
            optimizer.step()
    for p, q in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_shapes_of_parameters(case):
    for shape in [(), (1,), (7,), (1, 1), (4, 3), (2, 3, 4), (0,), (0, 3), (3, 0)]:
        param = nn.Parameter(torch.ones(shape))
        optimizer = case([{"params": [("mlp.weight", param)], **({} if case is REFERENCE else {"role": "mlp"})}])
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert (param < 1).all() and param.shape == shape
        assert param.numel() == 0 or float(optimizer.state[param]["step"]) == 2
        copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())
        if param.numel() == 0:
            case([("gadget", param)])  # there is no role to know


def test_dtypes_may_be_mixed(case):
    """Each parameter as if it were alone."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    together = [nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6).to(dtype)) for dtype in dtypes]
    alone = copy.deepcopy(together)
    optimizers = [case([(f"mlp.{index}.weight", param) for index, param in enumerate(together)])]
    optimizers += [case([(f"mlp.{index}.weight", param)]) for index, param in enumerate(alone)]
    for step in range(4):
        grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for param in (*together, *alone):
            param.grad = grad.to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(together, alone, strict=True))


def test_sparse_gradients_are_refused_by_name(case):
    embedding = nn.Embedding(7, 4, sparse=True)
    optimizer = case([("embed_tokens.weight", embedding.weight)])
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(embedding.weight, before)


def test_the_default_dtype_changes_nothing(case):
    expected, _ = trained(case)
    model = Net()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = case(model.named_parameters())
        train(model, optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(model, expected)
    assert all(tensor.dtype != torch.float64 for tensor in tensors_in(optimizer.state) if tensor.dim())
