"""AdaPM for PyTorch Lightning and LitGPT: AdamW with a fraction of its momentum."""

from lightning_adapm.optim import AdaPM

__all__ = ["AdaPM"]
