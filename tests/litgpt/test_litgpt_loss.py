"""The loss of logits in chunks, and its gradients, are those of all logits at once, in every precision."""

import pytest
import torch
from torch import nn

from lightning_adapm.litgpt.loss import chunked_loss, summed_loss

CHUNK, IGNORED = 4, -100


def gradients(dtype, loss, trained=(True, True), bias=True, autocast=False):
    """Loss of a head of 50 tokens on 3 x 14 positions, some of them ignored, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=bias)
    hidden, targets = torch.randn(3, 14, 16, generator=generator), torch.randint(50, (3, 14), generator=generator)
    targets[torch.rand(3, 14, generator=generator) < 0.3] = IGNORED
    with torch.no_grad():
        for param in head.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) / 4)
    head.bfloat16().to(dtype).requires_grad_(trained[1])  # the same numbers in every dtype
    hidden = hidden.bfloat16().to(dtype).requires_grad_(trained[0])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total = loss(head, hidden, targets) / 30
    total.backward()
    return [total.detach(), *(each.grad for each in (hidden, *head.parameters()) if each.requires_grad)]


def whole(head, hidden, targets):
    return summed_loss(head(hidden), targets, IGNORED)


def chunked(head, hidden, targets):
    return chunked_loss(head, hidden, targets, IGNORED, CHUNK)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [(True, True), (False, True), (True, False)])
def test_the_same_numbers(trained, bias):
    for one, other in zip(*(gradients(torch.float32, each, trained, bias) for each in (whole, chunked)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bfloat16_are_rounded_once_a_chunk(autocast):
    """By 2^-9 of what has been added up. All logits at once are rounded once; both round the gradients by logits."""
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = gradients(torch.float32, whole)
    for loss, rounded in ((whole, 2), (chunked, 1 + 14 / CHUNK)):
        found = gradients(dtype, loss, autocast=autocast)
        assert [each.dtype for each in found[1:]] == [dtype] * 3
        for one, other in zip(found, exact, strict=True):
            assert (one - other).norm() <= rounded * 2**-9 * other.norm(), loss


def test_hooks_of_the_head_see_every_chunk():
    seen = []

    def hooked(head, hidden, targets):
        head.register_forward_hook(lambda _, inputs, logits: seen.append(logits.shape[1]))
        return chunked(head, hidden, targets)

    for one, other in zip(gradients(torch.float32, whole), gradients(torch.float32, hooked), strict=True):
        torch.testing.assert_close(one, other)
    assert seen[:4] == [4, 4, 4, 2]


def test_losses_are_summed_in_float32_whatever_the_default_dtype():
    """The Trainer's bf16-true makes bfloat16 the default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert gradients(torch.bfloat16, chunked)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
