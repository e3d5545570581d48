"""Text data for language models, from files on this machine; nothing is downloaded."""

from lightning_adapm.data.loaders import TrainLoader, ValLoader
from lightning_adapm.data.module import TextDataModule

__all__ = ["TextDataModule", "TrainLoader", "ValLoader"]
