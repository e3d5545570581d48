"""The Lightning Trainer's side: the module mixin, the command line and callbacks."""
