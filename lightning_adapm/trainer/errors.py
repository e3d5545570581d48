"""One line about an error of input: the option, what was found, and what to write instead."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

WRITE_MODEL = (
    "Give --config recipe:NAME (`lightning-adapm recipes` lists them), --config FILE with `model: {class_path: ...,"
    " init_args: ...}`, or --model CLASS"
)
_UNRECOGNIZED, _NEAREST, _LISTED = "Unrecognized arguments: ", "did you mean ", "-h lists all options"
_ABOUT_TYPES = (
    "Expected a",
    "Does not validate against",
    "Not a valid subclass",
    "Import path",
    "Cannot take a Union",
    "a class path (str)",
    "a dict with",
)
"""Beginnings of the parser's lines about the types that a value may have."""
_WORDS = {
    "NoneType": "null",
    "int": "an int",
    "float": "a float",
    "bool": "true or false",
    "str": "text",
    "dict": "a mapping",
}


class CommandParser(ArgumentParser):
    """Parser that raises its errors, for :func:`one_line`, and suggests a known option for an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise an ``argparse.ArgumentError``; jsonargparse would print all options and exit."""
        raise argparse.ArgumentError(None, message + nearest_option(message, self)) from ex


def nearest_option(message: str, parser: argparse.ArgumentParser) -> str:
    """Suggest an option to append to a parser's ``message`` about an unknown one; empty for other messages."""
    unknown = message.partition(_UNRECOGNIZED)[2].split(" ")[0].partition("=")[0]
    if not unknown.startswith("-") or _LISTED in message or _NEAREST in message:
        return ""
    found = difflib.get_close_matches(unknown, sorted(set(_options(parser))), n=1, cutoff=0.75)
    return f"; {_NEAREST}{found[0]}?" if found else f"; {_LISTED}"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Options of a parser and of the parsers of its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for chosen in action.choices.values():
                yield from _options(chosen)


def one_line(error: Exception) -> str:
    """Text of an error without the parser's lists of types that a value does not have."""
    text = str(error)
    if re.search(r'Key "(\w+\.)?model" is required', text):
        return f"which model? {WRITE_MODEL}"
    if text.startswith("Unexpected config:"):
        return f"a file after --config is empty or not a mapping. {WRITE_MODEL}"
    if text.startswith("Error(s) in loading state_dict"):
        first, *others = [line.strip()[:200] for line in text.splitlines()[1:]]
        more = f", and {len(others)} more mismatches" if others else ""
        return f"`ckpt_path` has the weights of another model than `model`: {first}{more}; give the `model` of that run"
    if text.startswith(("Parser key", "Validation failed", "Problem with")) or "Union subtypes" in text:
        return _reason(text)
    return text


def _reason(text: str) -> str:
    """Find the reason in a text of jsonargparse, which indents the texts about parts of a value."""
    text = textwrap.dedent(text).strip()
    if found := re.match(r'(?:Validation failed: )?Parser key "([\w.+-]+)":\s', text):
        rest = _reason(text[found.end() :])
        return f"{found[1]} {rest}" if rest.startswith("must be") else f"{found[1]}: {rest}"
    problems = re.findall(
        r"^( *)(?:- )?Problem with given class_path '(.+)':\n((?:\1 +.*(?:\n|$))+)", text, re.MULTILINE
    )
    if problems:
        return "; ".join(dict.fromkeys(_of_class(path, details) for _, path, details in problems))
    refusals = dict.fromkeys(
        line for line in re.findall(r"^ *- (.*)$", text, re.M) if not line.startswith(_ABOUT_TYPES)
    )
    if refusals:
        return "; ".join(refusals)
    if found := re.search(r"Expected a <class '([\w.]+)'>\. Got value: (.*)", text, re.DOTALL):
        return f"must be {_in_words(found[1])}, but got {found[2]!r}"
    if given := re.search(r"Given value: (.*)", text, re.DOTALL):
        types = _subtypes(text).replace(", <class 'torch.Tensor'>", "")  # nobody builds one on a command line
        meant_a_class = "Expected a dot import path string" in text and "." in types
        return _no_class(given[1], types) if meant_a_class else _of_types(types, given[1])
    if missing := re.search(r'Key "([\w.]+)" is required', text):
        return f"{missing[1]} is needed, and not given"
    return " ".join(text.split()).removeprefix("Validation failed: ")


def _of_class(path: str, details: str) -> str:
    """Describe what is wrong with a class, or with one of its arguments."""
    text = " ".join(details.split())
    module, _, name = path.rpartition(".")
    if unknown := re.search(r"Key '([\w.]+)' is not expected", text):
        return f"{path} has no option {unknown[1]!r}; {_instead(unknown[1], _arguments(path))}"
    if missing := re.search(r'Key "([\w.]+)" is required', text):
        return f"{path} needs {missing[1]!r}, which is not given; write {missing[1]}: ... among its init_args"
    if "Neither `tensorboard` nor" in text:
        return f"{path} needs tensorboard: pip install 'lightning-adapm[tensorboard]'"
    if "has no attribute" in text:
        names = _names(module)
        return f"there is no class {path!r}; " + (_instead(name, names, "names") if names else f"{text}")
    return f"{path}: {_reason(details)}"


def _arguments(path: str) -> list[str]:
    from lightning_adapm.optim.options import options_of

    module, _, name = path.rpartition(".")
    return [option for option in options_of(getattr(importlib.import_module(module), name)) if option != "params"]


def _names(module: str) -> list[str]:
    """Public names of a module; none where it cannot be imported."""
    try:
        found = importlib.import_module(module)
    except ImportError:
        return []
    return list(getattr(found, "__all__", dir(found)))


def _instead(name: str, known: Iterable[str], what: str = "options") -> str:
    from lightning_adapm.optim.options import instead_of

    return instead_of(name, known, what)


def _subtypes(text: str) -> str:
    return (re.findall(r"Subtypes: \[(.*)\]", text) or [""])[0]


def _no_class(name: str, types: str) -> str:
    """Name the nearest class of the wanted ``types`` for a name that is no class, or list all of them."""
    paths: dict[str, str] = {}
    for path in re.findall(r"<class '([\w.]+\.\w+)'>", types):
        module, _, base = path.rpartition(".")
        for found in _subclasses(getattr(importlib.import_module(module), base)):
            if not found.__name__.startswith("_"):
                paths.setdefault(found.__name__, _public(found))
    near = difflib.get_close_matches(name, paths, n=1)
    hint = f"did you mean {paths[near[0]]!r}?" if near else f"there are {', '.join(sorted(paths.values())[:30])}"
    return f"there is no class {name!r}; {hint}"


def _public(found: type[Any]) -> str:
    """Shortest path of a class among this package, the packages around its module, and the module."""
    parts = found.__module__.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    module = next((each for each in ("lightning_adapm", *around) if found.__name__ in _names(each)), found.__module__)
    return f"{module}.{found.__name__}"


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for found in base.__subclasses__():
        yield found
        yield from _subclasses(found)


def _in_words(path: str) -> str:
    return _WORDS.get(path, f"a class path of {path.rpartition('.')[2]}" if "." in path else f"a {path}")


def _of_types(types: str, given: str) -> str:
    """Describe what a value must be, by the types that it may have, and what was found."""
    literals = [word.strip("'") for found in re.findall(r"Literal\[(.*?)\]", types) for word in found.split(", ")]
    wanted = [_in_words(path) for path in re.findall(r"<class '([\w.]+)'>", re.sub(r"Literal\[.*?\]", "", types))]
    wanted += ["a list"] * bool(re.search(r"\b(list|Iterable|Sequence)\[", types))
    wanted += ["a mapping"] * bool(re.search(r"\b(dict|Mapping)\[", types))
    near = difflib.get_close_matches(given, literals, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    choices = sorted(dict.fromkeys([*literals, *wanted]), key="null".__eq__)
    wanted_text = " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))
    return f"must be {wanted_text}, but got {given[:200]!r}{hint}"
