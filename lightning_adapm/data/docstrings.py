"""Instructions for finetuning, from the docstrings of Python sources."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator

QUESTION = "What does this Python function do?"
_ANSWER_LENGTH = range(16, 121)
_LONGEST_SIGNATURE = 120


def instructions(texts: Iterable[str]) -> list[dict[str, str]]:
    """Make questions about functions, with answers, in Alpaca's format; each question occurs once.

    A question contains the function's signature. Its answer is the first paragraph of the docstring. Texts that this
    version of Python cannot parse give none.

    Args:
        texts: Python sources.

    Returns:
        Dicts of ``instruction``, ``input`` (empty) and ``output``.
    """
    found: dict[str, str] = {}
    for text in texts:
        for signature, answer in _documented(text):
            found.setdefault(f"{QUESTION}\n{signature}", answer)
    return [{"instruction": question, "input": "", "output": answer} for question, answer in found.items()]


def _documented(text: str) -> Iterator[tuple[str, str]]:
    """Yield signatures and first paragraphs of docstrings that are short enough for a small model to learn."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sources sometimes have invalid escapes
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            answer = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            signature = f"def {node.name}({ast.unparse(node.args)}):"
            if len(answer) in _ANSWER_LENGTH and len(signature) <= _LONGEST_SIGNATURE:
                yield signature, answer
