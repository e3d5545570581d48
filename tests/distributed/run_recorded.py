"""Steps of rows that processes share, replayed on one model and launched on another: ``run_recorded.py``.

Every step must leave the same bits, exchange as much, and once all kinds of steps are recorded wait for nothing.
"""

import torch
from jobs import RECORDED_JOBS, draw_gradients
from strategies import device, processes, shard

from lightning_adapm.sharding import owners
from lightning_adapm.sharding.collectives import TRAFFIC
from lightning_adapm.sharding.find import layout_of, local
from lightning_adapm.step import exchange
from lightning_adapm.step.recorder import MOST_BYTES

STEPS, SETTLED = 38, 26
"""Number of steps, and of those after which all are replayed."""


def main():
    with processes():
        for job in RECORDED_JOBS.values():
            compare(job)
        owners.LARGE = exchange.ROUND_NUMEL = 1  # each matrix has an exchange of its own, and each batch is read apart
        compare(RECORDED_JOBS["muon"])


def compare(job):
    models = [shard(job.build().to(device())) for _ in range(2)]
    optimizers = [job.optimizer(model) for model in models]
    optimizers[0].most_recorded_bytes, optimizers[1].most_recorded_bytes = MOST_BYTES, 0
    for step in range(STEPS):
        exchanged = []
        for model, optimizer in zip(models, optimizers, strict=True):
            give_gradients(model, step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
            before = TRAFFIC.bytes, TRAFFIC.collectives
            torch.cuda.set_sync_debug_mode("error" if step >= SETTLED else "default")
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            exchanged.append((TRAFFIC.bytes - before[0], TRAFFIC.collectives - before[1]))
        assert exchanged[0] == exchanged[1], (step, exchanged)
        assert_same_bits(step, models, optimizers)
    paths = optimizers[0].step_paths()
    assert {(row.path, row.launches) for row in paths} == {("kernels", "replayed")}, paths
    assert optimizers[0].nonfinite_gradients() == optimizers[1].nonfinite_gradients() != {}


def give_gradients(model, step):
    """Gradients that lie elsewhere in every step; one is not finite in some steps, and one is missing once."""
    for name, param in model.named_parameters():
        param.grad = torch.zeros_like(param)
        if step == 9 and name.endswith("mlp.proj.weight"):
            param.grad = None
    draw_gradients(model, step)
    for name, param in model.named_parameters():
        layout = layout_of(param)
        if step in (13, 29) and "qkv" in name and layout.held[0] == 0 < layout.held[1]:
            local(param.grad).view(-1)[0] = float("nan")


def assert_same_bits(step, models, optimizers):
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(local(one), local(other)), (step, name)
        for key, value in optimizers[1].state[other].items():
            found = optimizers[0].state[one][key]
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(value)), (step, name, key)


if __name__ == "__main__":
    main()
