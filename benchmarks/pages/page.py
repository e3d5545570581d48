"""Output of a benchmark: JSON, from it a dated page, and a plot beside them that the repository does not keep."""

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.store import command_line, hardware, versions

RESULTS = Path(__file__).parents[1] / "results"


def session(module: str, device: str) -> dict[str, Any]:
    """Hardware, versions, date and command of a measurement."""
    return {
        "command": command_line(f"python -m benchmarks.{module}", sys.argv[1:]),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        "hardware": hardware(device),
        "versions": versions(),
    }


def provenance(result: Mapping[str, Any]) -> str:
    """Line of a page that states how to reproduce its numbers."""
    return f"{result['date']}, {result['hardware']}, {result['versions']}: `{result['command']}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def mean_and_turns(row: dict[str, Any]) -> str:
    """The cell of the mean, with the fastest and the slowest turn."""
    return f"{row['mean_ms']:.2f} ({min(row['turns_ms']):.2f} to {max(row['turns_ms']):.2f})"


def write(file: Path, result: Mapping[str, Any], page: str) -> None:
    """Write the JSON to ``file`` and the page next to it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    file.with_suffix(".md").write_text(page)


def stacked_bars(file: Path, title: str, unit: str, bars: Mapping[str, Mapping[str, float]], mark: str = "") -> None:
    """Horizontal bars of parts, one per name, as an SVG, where there is matplotlib.

    The part called ``mark`` is not stacked but drawn as a line across the bar.
    """
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "lightning-adapm"  # the same picture, the same file
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(bars) + 1.2), layout="constrained")
    names = list(bars)
    left = [0.0] * len(names)
    for part in dict.fromkeys(part for parts in bars.values() for part in parts if part != mark):
        widths = [bars[name].get(part, 0.0) for name in names]
        axes.barh(names, widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    marks = [(index, bars[name][mark]) for index, name in enumerate(names) if mark in bars[name]]
    if marks:
        axes.vlines([at for _, at in marks], [i - 0.4 for i, _ in marks], [i + 0.4 for i, _ in marks], "k", label=mark)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
