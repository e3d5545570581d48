"""The subcommands of ``lightning-adapm``."""

LITGPT_COMMANDS = ("pretrain", "finetune", "finetune_full", "finetune_lora", "finetune_adapter", "finetune_adapter_v2")
"""litgpt's commands that train. They also work without the word litgpt before them, because Fabric starts the processes
of other devices that way."""
