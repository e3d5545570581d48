"""Optimizers: ``torch.optim.Optimizer`` shells over momentum and second moment."""

from lightning_adapm.optim.adapm import AdaPM

__all__ = ["AdaPM"]
