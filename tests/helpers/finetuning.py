"""A tiny litgpt model's tokenizer, instructions and preferences, made on the spot."""

import json
import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONFIG = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "intermediate_size": 48,
    "mlp_class_name": "LLaMAMLP",
    "norm_class_name": "RMSNorm",
    "bias": False,
    "vocab_size": 300,
    "padded_vocab_size": 320,
    "block_size": 128,
}
COLOURS = ("red", "green", "blue", "white")


def write_tokenizer(folder, end="<|endoftext|>"):
    """A byte-level tokenizer of 300 tokens, as litgpt reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["### Instruction: ### Response: which colour is it"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": end, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def write_instructions(path, count=24):
    """Instructions in Alpaca's format, whose answers follow from them."""
    draw = random.Random(0)
    samples = [
        {"instruction": f"say {colour}", "input": "", "output": f"{colour} it is"}
        for colour in draw.choices(COLOURS, k=count)
    ]
    path.write_text(json.dumps(samples))
    return path


def write_preferences(path, count=24):
    """Pairs in which the right colour is preferred to none."""
    draw = random.Random(0)
    pairs = [
        {"prompt": f"say {colour}", "chosen": f"{colour} it is", "rejected": "no"}
        for colour in draw.choices(COLOURS, k=count)
    ]
    path.write_text(json.dumps(pairs))
    return path
