"""The subcommands of ``lightning-adapm``."""

LITGPT_COMMANDS = ("pretrain", "finetune", "finetune_full", "finetune_lora", "finetune_adapter", "finetune_adapter_v2")
"""Those of litgpt that train. Without the word litgpt before it: so Fabric starts the processes of other devices, with
the words that litgpt reads."""
