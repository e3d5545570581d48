"""The subcommands of ``lightning-adapm``."""

COMMANDS = ("recipes", "plan", "prepare", "fit", "validate", "test", "predict", "litgpt")
LITGPT_COMMANDS = ("pretrain", "finetune", "finetune_full", "finetune_lora", "finetune_adapter", "finetune_adapter_v2")
"""litgpt's commands that train. They also work without the word litgpt before them, because Fabric starts the processes
of other devices that way."""


def check_command(word: str) -> None:
    """Check the name of a command, because Lightning's parser knows only its own.

    Raises:
        ValueError: There is no such command.
    """
    if word not in (*COMMANDS, *LITGPT_COMMANDS) and not word.startswith("-"):
        from lightning_adapm.optim.options import instead_of

        raise ValueError(f"there is no command {word!r}; {instead_of(word, COMMANDS, 'commands')}")
