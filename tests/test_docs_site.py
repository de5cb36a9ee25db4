"""The documentation site: it builds without a warning, its examples are what commands print, its pages name the API."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from children import HUNG_S

import powerplan
import powerplan.kernels
import powerplan.models

ROOT = Path(__file__).resolve().parent.parent
SITE = runpy.run_path(str(ROOT / "scripts" / "docs_site.py"))
NOTEBOOK = ROOT / "examples" / "plan_in_a_notebook.ipynb"


def test_the_site_builds_without_a_warning_and_takes_nothing_from_another_host(tmp_path: Path) -> None:
    shutil.rmtree(SITE["SOURCES"], ignore_errors=True)  # As in a new clone.
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HUNG_S, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    pages = {str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for source in (ROOT / "docs").glob("*.md"):
        assert f"{source.stem}.html" in pages
    for name, page in pages.items():
        taken = re.findall(r"<(?:script|img|iframe|source)[^>]* src=\W?(https?:[^ >]+)", page)
        taken += re.findall(r"<link[^>]* href=\W?(https?:[^ >]+)", page)
        assert not taken, name
    assert "weight-state FLOP ratio" in pages["index.html"]
    assert (tmp_path / "benchmarks" / "results" / "recommend.json").is_file()
    assert (tmp_path / "search" / "search_index.js").is_file()
    assert 'id="powerplan.kernels.power_attention"' in pages["reference/kernels.html"]
    returned = re.findall(r"Returns:</span></p>\s*<ul>(.*?)</ul>", pages["reference/kernels.html"], re.DOTALL)
    assert len(returned) >= 4
    assert all(items.count("<li") == 1 for items in returned), "its lines are one text"


def test_the_gallery_shows_what_the_commands_print() -> None:
    """Where an output has changed on purpose, `python scripts/gallery.py` writes the page anew."""
    gallery = runpy.run_path(str(ROOT / "scripts" / "gallery.py"))
    assert (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8") == gallery["gallery_page"]()


def test_the_gallery_has_the_figures_of_its_commands(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gallery = runpy.run_path(str(ROOT / "scripts" / "gallery.py"))
    gallery["draw"](tmp_path)
    kept = ROOT / "docs" / "images" / "gallery"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in kept.iterdir()}
    for path in kept.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.read_bytes()[16:24] == (tmp_path / path.name).read_bytes()[16:24], "another size"


def texts(notebook: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """Return the cells of a notebook with what they printed; of what they drew only that they did."""
    cells = []
    for cell in notebook["cells"]:
        printed = [
            output.get("text") or {kind: data for kind, data in output["data"].items() if kind != "image/png"}
            for output in cell.get("outputs", ())
        ]
        cells.append(("".join(cell["source"]), printed))
    return cells


def test_the_notebook_prints_what_it_shows(tmp_path: Path) -> None:
    """Where an output has changed on purpose, `python scripts/notebook.py` writes the notebook anew."""
    target = tmp_path / "run.ipynb"
    command = [sys.executable, ROOT / "scripts" / "notebook.py", target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S, check=False)
    assert done.returncode == 0, done.stderr
    kept = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert texts(json.loads(target.read_text(encoding="utf-8"))) == texts(kept)
    assert "image/png" in str(kept)
    assert all(cell["outputs"] for cell in kept["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("package", [powerplan, powerplan.kernels, powerplan.models], ids=lambda it: it.__name__)
def test_the_reference_has_every_public_name(package: Any) -> None:
    _, names = SITE["REFERENCE"][package.__name__]
    assert set(package.__all__) - {"__version__"} == {name for name in names if "." not in name}


@pytest.mark.parametrize(
    ("source", "link", "led"),
    [
        ("README.md", "docs/spec.md", "spec.md"),
        ("README.md", "docs/accounting.md#per-layer", "accounting.md#per-layer"),
        ("README.md", "benchmarks/results/startup.json", "benchmarks/results/startup.json"),
        ("README.md", "https://example.org/docs/spec.md", "https://example.org/docs/spec.md"),
        ("README.md", "#limits", "#limits"),
        ("docs/icl.md", "images/icl-code.png", "images/icl-code.png"),
        ("docs/icl.md", "spec.md", "spec.md"),
        ("docs/icl.md", "../README.md#limits", "index.md#limits"),
        ("docs/icl.md", "../benchmarks/NOTES.md", "benchmarks/NOTES.md"),
        ("docs/gallery.md", "../examples/plan_in_a_notebook.ipynb", "notebook.md"),
        ("benchmarks/NOTES.md", "../docs/spec.md", "../spec.md"),
        ("benchmarks/NOTES.md", "results/gpu.json", "results/gpu.json"),
    ],
)
def test_links_of_the_repository_lead_to_pages_of_the_site(source: str, link: str, led: str) -> None:
    assert SITE["relinked"](f"See [this]({link}).", source) == f"See [this]({led})."


def test_a_notebook_becomes_markdown() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["print(1)"], "outputs": [{"output_type": "stream", "text": ["1\n"]}]},
        {"cell_type": "code", "source": ["2"], "outputs": [{"data": {"text/plain": ["2"], "text/markdown": ["*2*"]}}]},
        {"cell_type": "code", "source": ["draw()"], "outputs": [{"data": {"text/plain": ["x"], "image/png": "iVBO"}}]},
    ]
    page = SITE["notebook_page"](json.dumps({"cells": cells}))
    assert page.split("\n\n")[:5] == [
        "# Title\ntext",
        "```python\nprint(1)\n```",
        "```text\n1\n```",
        "```python\n2\n```",
        "*2*",
    ]
    assert page.endswith("\n\n![What the cell draws](data:image/png;base64,iVBO)\n")
