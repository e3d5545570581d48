"""What a step of an optimizer allocates."""

import torch

from lightning_adapm.report.allocations import AllocationTracker


def transient_of_a_step(optimizer):
    """Most bytes that a step has at a time besides parameters, gradients and state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = [*params, *(param.grad for param in params), *filter(torch.is_tensor, states)]
    tracker = AllocationTracker({"held": held})
    with tracker.following():
        optimizer.step()
    return tracker.peak["transient"]
