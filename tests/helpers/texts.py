"""Text to train on, made up."""

import random

WORDS = "the a of to in matrix vector rank step loss weight learns moves stays small large slowly again never".split()


def write_corpus(folder, files=12, words=400, seed=0):
    """Text files of a few hundred short words each, always the same."""
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(files):
        lines = [" ".join(generator.choices(WORDS, k=8)) for _ in range(words // 8)]
        (folder / f"document_{index}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
