"""Parameters that move together inside backward, and gradients that come otherwise than in the step before."""

import pytest
import torch
from models import PlainLM, token_batches
from torch import nn

from lightning_adapm import AdaPM


@pytest.mark.parametrize(("vocab", "takes"), [(61, 5), (1000, 4)], ids=["blocks are larger", "embeddings are larger"])
def test_complete_gradients_move_together_within_the_bound(vocab, takes):
    model = PlainLM(vocab, bias=False, layers=4)
    optimizer = AdaPM(model.parameters(), rank=2, update_in_backward=True)
    bound = max(sum(p.nbytes for p in model.layers[0].parameters()), model.embed_tokens.weight.nbytes)
    moved, take = [], optimizer._move_selected

    def watched(selected):
        moved.append([p for _, params in selected for p in params if p.grad is not None])
        return take(selected)

    def arrives(param):
        assert sum(p.nbytes for p in model.parameters() if p.grad is not None and p is not param) <= bound

    optimizer._move_selected = watched
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(arrives)
    steps = []
    for _ in range(3):
        hooks = []

        def closure(hooks=hooks):
            hooks.extend(len(p._post_accumulate_grad_hooks) - 1 for p in model.parameters())
            model(token_batches(1)[0]).backward()

        moved.clear()
        optimizer.step(closure)
        *early, left = moved
        assert len(early) == takes and not left
        hooked = sum(min(len(params), 2) for params in early)
        assert sorted(id(p) for params in early for p in params) == sorted(map(id, model.parameters()))
        assert sum(hooks) == (hooked if steps else len(hooks))  # turns are known from the first step on
        steps.append([[id(p) for p in params] for params in early])
    assert steps[0] == steps[1] == steps[2]


class Winding(nn.Module):
    """Layers that run in any order, some of them not at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(6, 6)}) for _ in range(5))

    def forward(self, order):
        x = torch.linspace(-1, 1, 6, dtype=torch.float64)
        for index in order:
            x = x + self.layers[index]["mlp"](x)
        return x.square().mean()


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (0, 2, 1, 4, 3), (0, 1, 3), (1, 2), ()])
def test_gradients_in_another_order_than_before(order):
    """Each moves once, soon, and from then on all are watched again."""
    nets = [Winding().double() for _ in range(2)]
    optimizers = [
        AdaPM(net.parameters(), rank=2, update_in_backward=now) for net, now in zip(nets, (True, False), strict=True)
    ]
    block = sum(p.nbytes for p in nets[0].layers[0].parameters())
    held = []
    for used in (range(5), range(5), order, (3, 1, 0, 2, 4)):
        for net, optimizer in zip(nets, optimizers, strict=True):

            def closure(net=net, optimizer=optimizer, used=used):
                optimizer.zero_grad()
                loss = net(used)
                if used:
                    loss.backward()
                return loss

            optimizer.step(closure)
            if optimizer.update_in_backward:
                held.append(sum(p.nbytes for p in net.parameters() if p.grad is not None))
        for ours, plain in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(ours, plain)
    assert held[0] == held[1] == held[3] == 0 and held[2] <= block


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_that_are_held_later_are_added_to(steps):
    """Turns that are known are not for a step whose gradients begin with those of another backward pass."""
    trained = []
    for now in (True, False):
        torch.manual_seed(0)
        model = PlainLM(bias=False).double()
        optimizer = AdaPM(model.parameters(), rank=2, update_in_backward=now)
        batches = token_batches(steps + 2)

        def closure(model=model, tokens=batches[0]):
            loss = model(tokens)
            loss.backward()
            return loss

        for _ in range(steps):
            optimizer.zero_grad()
            optimizer.step(closure)
        optimizer.zero_grad()
        model(batches[1]).backward()
        if now:
            with pytest.warns(UserWarning, match="saves no gradient memory here"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        trained.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*trained)
