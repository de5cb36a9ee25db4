"""Write the results of examples/train_icl.py into docs/icl.md, and its figures into docs/images/.

Usage: python scripts/icl_docs.py [RESULT.json]   (benchmarks/results/icl-cpu.json without)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from icl.plots import curve_plot  # noqa: E402
from icl.result import read, table  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "icl-cpu.json"
PAGE = ROOT / "docs" / "icl.md"
IMAGES = ROOT / "docs" / "images"
MARK = "<!-- results: python scripts/icl_docs.py -->"


def section(data: Mapping[str, Any]) -> str:
    """Return the results as Markdown: where they come from, then a table and a figure for each task."""
    machine, versions = data["machine"], data["versions"]
    threads = "thread" if machine["threads"] == 1 else "threads"
    lines = [
        f"`{data['command']}` on {machine['device']}; {machine['jobs']} runs at a time,",
        f"{machine['threads']} {threads} each; torch {versions['torch']}, Python {data['python']}, {data['date']}.",
        f"The runs took {data['seconds'] / 60:,.0f} minutes, added up ([result](../benchmarks/results/icl-cpu.json)).",
    ]
    for record in data["tasks"]:
        name = record["task"]
        lines += ["", f"### {name}", "", table(record, "github"), "", f"![{name}](images/icl-{name}.png)"]
    return "\n".join(lines)


def page(text: str, data: Mapping[str, Any]) -> str:
    """Return the page with the section after its mark, up to the end, replaced."""
    before, mark, _ = text.partition(MARK)
    assert mark, f"{PAGE} has lost its mark"
    return f"{before}{MARK}\n{section(data)}\n"


def main() -> int:
    data = read(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT)
    IMAGES.mkdir(exist_ok=True)
    for record in data["tasks"]:
        (IMAGES / f"icl-{record['task']}.png").write_bytes(curve_plot(record))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), data), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
