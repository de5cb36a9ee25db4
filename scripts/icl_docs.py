"""Write the results of examples/train_icl.py into docs/icl.md, and their figures into docs/images/.

Usage: python scripts/icl_docs.py   (after benchmarks/results/icl-*.json have changed)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from icl.plots import curve_plot  # noqa: E402
from icl.result import read, table  # noqa: E402

RESULTS = {"Equal FLOPs": "icl-cpu", "Equal tokens": "icl-tokens-cpu"}
"""Heading of each result, and its file under benchmarks/results, in the order of the page."""

PAGE = ROOT / "docs" / "icl.md"
"""The page that is written."""

IMAGES = ROOT / "docs" / "images"
"""The folder of its figures."""

MARK = "<!-- results: python scripts/icl_docs.py -->"
"""The line of the page after which everything is generated."""


def result_of(name: str) -> dict[str, Any]:
    """Return the result in benchmarks/results that has this name."""
    return read(ROOT / "benchmarks" / "results" / f"{name}.json")


def image(name: str, task: str) -> str:
    """Return the file name of the figure of a task."""
    return f"{name.removesuffix('-cpu')}-{task}.png"


def section(title: str, name: str, data: Mapping[str, Any]) -> str:
    """Return one result as Markdown: how it was made, then a table and a figure for each task."""
    machine, versions = data["machine"], data["versions"]
    threads = "thread" if machine["threads"] == 1 else "threads"
    lines = [
        f"### {title}",
        "",
        f"`{data['command']}` on {machine['device']}; {machine['jobs']} runs at a time,",
        f"{machine['threads']} {threads} each; torch {versions['torch']}, Python {data['python']}, {data['date']}.",
        f"The runs took {data['seconds'] / 60:,.0f} minutes, added up ([result](../benchmarks/results/{name}.json)).",
    ]
    for record in data["tasks"]:
        task = record["task"]
        lines += ["", f"`{task}`:", "", table(record, "github"), "", f"![{title}: {task}](images/{image(name, task)})"]
    return "\n".join(lines)


def page(text: str, sections: Sequence[str]) -> str:
    """Return the page with everything after MARK replaced by `sections`."""
    before, mark, _ = text.partition(MARK)
    assert mark, f"{PAGE} has lost its mark"
    return "\n\n".join((f"{before}{MARK}", *sections)) + "\n"


def main() -> int:
    IMAGES.mkdir(exist_ok=True)
    sections = []
    for title, name in RESULTS.items():
        data = result_of(name)
        sections.append(section(title, name, data))
        for record in data["tasks"]:
            (IMAGES / image(name, record["task"])).write_bytes(curve_plot(record))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), sections), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
