"""Hooks of mkdocs: the site has the repository's layout, so that its pages' links work on a Git host and on the site.

The pages are README.md, CHANGELOG.md and docs/*.md, and whatever they link to: Markdown and pictures as they are, other
files as a page that shows their text, folders as their README or a list of their files. A page of the reference is
generated for each group of exported names.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from html import escape
from importlib import import_module
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

import lightning_adapm

REPOSITORY = Path(__file__).parents[2]
START = ("README.md", "CHANGELOG.md")
AS_THEY_ARE = (".md", ".svg", ".png")
LANGUAGES = {".yaml": "yaml", ".py": "python", ".toml": "toml", ".json": "json"}

NAV = {
    "Start": {"Overview": "README.md", "Quick start": "docs/quickstart.md"},
    "Choose": {
        "An optimizer": "docs/choosing-an-optimizer.md",
        "A policy": "docs/choosing-a-policy.md",
        "PartialMuon": "docs/partial-muon.md",
    },
    "Recipes": {"All recipes": "docs/recipes.md", "litgpt's own commands": "docs/litgpt.md"},
    "Your training": {
        "Callbacks and checkpoints": "docs/training.md",
        "Handing over parameters": "docs/handing-over.md",
        "Many processes": "docs/distributed.md",
    },
    "Extend": {"Moments and optimizers": "docs/extending.md", "Architectures": "docs/architectures.md"},
    "Benchmarks": {
        "Answers": "docs/benchmarks.md",
        "Studies": "docs/studies.md",
        "The paper's claims": "docs/paper.md",
        "Commands and studies": "benchmarks/README.md",
    },
    "How it works": {"The mathematics": "docs/how-it-works.md"},
}
"""Pages in the order in which people need them; those that do not exist are left out."""

API = {
    "Optimizers": ["AdaPM", "PartialMuon", "AdamMini", "LoRAPre", "AdaLomo", "Lomo", "adamw_state_dict"],
    "Trainer": ["AdaPMMixin", "AdaPMConfig", "PartialMuonConfig"],
    "Callbacks": [
        "OptimizerSummary",
        "OptimizerStateMonitor",
        "ResidualNormMonitor",
        "ClosingTable",
        "LitGPTCheckpoint",
        "trainer.cli.RichProgress",
    ],
    "Models and data": [
        "litgpt.LitGPTModule",
        "litgpt.preference.DPOModule",
        "litgpt.preference.PreferenceData",
        "litgpt.data.PreparedText",
        "data.TextDataModule",
    ],
    "Planning": ["explain", "report.explain.Explanation", "report.plan.Row", "report.plan.cached_bytes"],
    "Every optimizer": ["optim.base.RoleOptimizer"],
    "Moments and storages": [
        "moments.base.Moment",
        "moments.base.Momentum",
        "moments.base.SecondMoment",
        "moments.base.Direction",
        "moments.storage.Entry",
        "moments.storage.Storage",
    ],
}
"""Pages of the reference with their names below ``lightning_adapm``."""

MEMBERS = {
    "AdaPMMixin": ("schedule",),
    "optim.base.RoleOptimizer": (
        "momentum_for",
        "second_moment_for",
        "check_options",
        "path_for",
        "move",
        "step_paths",
        "nonfinite_gradients",
        "gradient_norm",
        "cached_bytes",
        "most_recorded_bytes",
    ),
    "moments.base.Moment": ("keys", "entries", "numbers", "fits", "dense", "from_dense", "resized"),
    "moments.base.Momentum": ("name", "direction"),
    "moments.base.SecondMoment": ("denominators",),
    "moments.storage.Storage": ("make", "read", "write"),
    "report.explain.Explanation": ("total", "adamw", "adamw_in_dtype", "parameters", "unmatched", "advice"),
}
"""Methods and properties that a user calls or overrides."""

_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
_ROLE = re.compile(r":(?:class|meth|func|attr|mod|data):(<code>)~?(?:[\w.]+\.)?(\w+</code>)")
_LEFT_OVER = re.compile(r'\n *<span class="o">\*\*</span><span class="n">left_over</span><span class="p">,</span>')
"""Parameter that only serves an error about options of other optimizers."""
_TAG = re.compile(r"<[^>]+>")
_OWNER = re.compile(r'(?=<h2 id="(lightning_adapm[\w.]*)\.(\w+)")')
_DEFAULT = re.compile(
    r'^( *<span class="n">(\w+)</span><span class="o">=</span>).*(?:[A-Z_]{4,}|lambda).*,</span>$', re.MULTILINE
)
_CONSTANT = re.compile(r'<autoref[^>]*identifier="(lightning_adapm[\w.]*)\.([A-Z_]+)"[^>]*>.*?</autoref>')
"""Constants as defaults, in signatures and in tables of parameters, of which a reader wants the values."""
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write the navigation."""
    listed = {page for pages in NAV.values() for page in pages.values()}
    there = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").glob("*.md")}
    if unlisted := there - listed:
        raise PluginError(f"docs/site/hooks.py: NAV lacks {', '.join(sorted(unlisted))}")
    if missing := set(lightning_adapm.__all__) - {name for names in API.values() for name in names}:
        raise PluginError(f"docs/site/hooks.py: API lacks {', '.join(sorted(missing))}")
    sections: list[dict[str, Any]] = []
    for section, pages in NAV.items():
        if present := [{title: page} for title, page in pages.items() if (REPOSITORY / page).is_file()]:
            sections.append({section: present})
    sections.append({"Reference": [{title: _api_page(title)} for title in API]})
    config.nav = [*sections, {"Changelog": "CHANGELOG.md"}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the repository's files that are pages or linked from one, and the reference."""
    files.append(File.generated(config, "assets/site.css", abs_src_path=str(Path(__file__).with_name("site.css"))))
    waiting = [*START, *(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").glob("*.md"))]
    added: set[str] = set()
    while waiting:
        path = waiting.pop()
        page = _page(path)
        if page in added or not (REPOSITORY / path).exists():
            continue  # mkdocs reports links to files that do not exist
        added.add(page)
        if (REPOSITORY / page).is_file():
            waiting += _linked(page) if page.endswith(".md") else ()
            source: dict[str, str] = {"abs_src_path": str(REPOSITORY / page)}
        else:
            source = {"content": _shown(path)}
        files.append(File.generated(config, page, inclusion=InclusionLevel.INCLUDED, **source))
    for title, names in API.items():
        content = "\n\n".join([f"# {title}", *(_documented(name) for name in names)])
        files.append(File.generated(config, _api_page(title), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to files that are shown as pages at these pages."""

    def pointed(match: re.Match[str]) -> str:
        start, link, anchor = match.groups()
        target = normpath(join(dirname(page.file.src_uri), link))
        shown = _page(target)
        if shown == target or files.get_file_from_path(shown) is None:
            return match[0]
        return f"{start}{link.rstrip('/')}{shown.removeprefix(target)}{anchor or ''}"

    return _LINK.sub(pointed, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Show the roles of docstrings, such as ``:class:`AdaPM```, as plain code, and defaults by their values, and hide
    ``**left_over``.
    """
    html = _LEFT_OVER.sub("", html)
    if "**left_over" in _TAG.sub("", html) and page.file.src_uri.startswith("reference/"):
        raise PluginError("docs/site/hooks.py: _LEFT_OVER no longer finds **left_over in the signatures")
    if page.file.src_uri.startswith("reference/"):
        start, *sections = _OWNER.split(html)
        html = start + "".join(map(_with_values, sections[::3], sections[1::3], sections[2::3]))
    return _ROLE.sub(r"\1\2", html)


def _with_values(module: str, name: str, section: str) -> str:
    """The section of a class with constants replaced by their values."""
    owner = getattr(import_module(module), name)

    def default(match: re.Match[str]) -> str:
        start, parameter = match.groups()
        if dataclasses.is_dataclass(owner):
            value = getattr(owner(), parameter)
        else:
            value = inspect.signature(owner).parameters[parameter].default
        return f'{start}{escape(repr(value))}<span class="p">,</span>'

    section = _DEFAULT.sub(default, section)
    return _CONSTANT.sub(lambda match: escape(repr(getattr(import_module(match[1]), match[2]))), section)


def _linked(path: str) -> Iterator[str]:
    """Files that a page links to, relative to the repository."""
    text = _FENCE.sub("", (REPOSITORY / path).read_text(encoding="utf-8"))
    for _, link, _ in _LINK.findall(text):
        if "://" not in link:
            yield normpath(join(dirname(path), link))


def _page(path: str) -> str:
    """Name of the page or picture that stands for a file or folder of the repository."""
    if path.endswith(AS_THEY_ARE):
        return path
    readme = f"{path}/README.md"
    return readme if (REPOSITORY / readme).is_file() else f"{path}.md"


def _shown(path: str) -> str:
    """Page with the text of a file, or the names of a folder's files."""
    file = REPOSITORY / path
    if file.is_dir():
        names = (each.relative_to(file).as_posix() for each in sorted(file.rglob("*")) if each.is_file())
        return "\n".join([f"# {path}", "", *(f"- `{name}`" for name in names if "__pycache__" not in name)])
    return f"# {path}\n\n````{LANGUAGES.get(file.suffix, 'text')}\n{file.read_text(encoding='utf-8')}\n````\n"


def _api_page(title: str) -> str:
    return f"reference/{title.lower().replace(' ', '-')}.md"


def _documented(name: str) -> str:
    """Entry of an exported name, read in the module that defines it and shown as users import it."""
    module = lightning_adapm._MODULES.get(name)
    path = f"lightning_adapm.{module}.{name}" if module else f"lightning_adapm.{name}"
    lines = [
        f"::: {path}",
        "    options:",
        f"      heading: lightning_adapm.{name}",
        f"      toc_label: {name.split('.')[-1]}",
    ]
    if members := MEMBERS.get(name):
        lines += [f"      members: [{', '.join(members)}]", "      inherited_members: true"]
    return "\n".join(lines)
