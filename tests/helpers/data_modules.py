"""Data modules of small windows."""

from lightning_adapm.data import TextDataModule


def data_module(corpus, tmp_path, **options):
    """A data module of small windows over a corpus."""
    options = {"vocab_size": 300, "block_size": 8, "batch_size": 4, "val_fraction": 0.2} | options
    return TextDataModule(str(corpus), "*.txt", cache_dir=str(tmp_path / "cache"), **options)


def ready(corpus, tmp_path, **options):
    """The same, set up to fit."""
    data = data_module(corpus, tmp_path, **options)
    data.prepare_data()
    data.setup("fit")
    return data
