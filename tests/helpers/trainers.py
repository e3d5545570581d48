"""Trainers of Lightning as tests want them."""

import lightning as L


def quiet_trainer(folder, **options):
    """A Trainer on the CPU that shows and logs nothing, unless an option of its own says otherwise."""
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=folder, **(quiet | options))
