"""The table of docs/distributed.md: AdaPM's momentum on 1 to 1,024 processes, computed from shapes.

Run: ``python -m benchmarks.scaling``
"""

import torch
from litgpt import GPT, Config

from lightning_adapm import AdaPM
from lightning_adapm.scaling import scaling

MODEL = "Llama-3-8B"


def main() -> None:
    with torch.device("meta"):
        model = GPT(Config.from_name(MODEL))
    optimizer = AdaPM(model.named_parameters())
    print(f"{MODEL}, rank 0.05, float32; exchanged bytes as a share of the gradients' bytes\n")
    print("| processes | basis | momentum per process | saved | exchanged per step | at a refresh |")
    print("|---|---|---|---|---|---|")
    for world_size in (1, 2, 4, 8, 16, 32, 64, 256, 1024):
        for basis in ("replicate", "shard") if world_size > 1 else ("replicate",):
            cost = scaling(optimizer, world_size, basis)
            exchanged = (cost.step, cost.refresh) if world_size > 1 else (0, 0)
            shares = " | ".join(f"{100 * size / cost.gradients:.3g} %" for size in exchanged)
            kept = f"{cost.momentum / 2**20:,.1f} MiB | {100 * cost.saved:.1f} %"
            print(f"| {world_size} | {basis} | {kept} | {shares} |")


if __name__ == "__main__":
    main()
