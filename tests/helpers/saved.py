"""A small model, trained by an AdaPM whose state is to be saved."""

from models import tiny_gpt, token_batches, train

from lightning_adapm import AdaPM

OPTIONS = {
    "lr": 3e-3,
    "rank": 2,
    "update_proj_gap": 4,
    "momentum": "compact",
    "state_dtype": {"low_rank": "bfloat16"},
}
"""Low-rank momentum of nearly every role."""


def trained(steps=6, model=None, **options):
    model = model or tiny_gpt()
    optimizer = AdaPM(model.parameters(), **(OPTIONS | options))
    train(model, optimizer, token_batches(steps))
    return model, optimizer
