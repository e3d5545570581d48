"""Text data for language models: files found on this machine, nothing downloaded."""

from lightning_adapm.data.loaders import TrainLoader, ValLoader
from lightning_adapm.data.module import TextDataModule

__all__ = ["TextDataModule", "TrainLoader", "ValLoader"]
