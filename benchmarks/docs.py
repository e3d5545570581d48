"""Put all results except studies into docs/benchmarks.md: ``python -m benchmarks.docs``."""

import re
from pathlib import Path

from benchmarks.pages.page import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
SECTIONS = ("step_time", "training_time", "peak_memory", "scaling")


def section(name: str, results: Path = RESULTS) -> str:
    """All pages of a benchmark, one below the other, with their headings under the section's."""
    pages = [file.read_text().strip() for file in sorted(results.glob(f"{name}*.md"))]
    text = "\n\n".join(pages) if pages else "Nothing is measured yet."
    text = re.sub(r"^(#+) ", r"##\1 ", text, flags=re.M)
    return re.sub(r"\]\((?=[^)/]+\.svg\))", "](../benchmarks/results/", text)


def filled(page: str) -> str:
    """The page with every section between its marks replaced by the results that there are.

    Raises:
        ValueError: the page lacks a mark.
    """
    for name in SECTIONS:
        before, start, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        if not end:
            raise ValueError(f"docs/benchmarks.md lacks the marks <!-- {name} --> and <!-- end {name} -->")
        page = f"{before}{start}{section(name)}\n{end}{after}"
    return page


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text()))


if __name__ == "__main__":
    main()
