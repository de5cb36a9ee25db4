"""Pages that several tests look at, and what is in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

import powerplan
from powerplan.webpage.page import Page

ROOT = Path(__file__).resolve().parent.parent.parent
PROFILE = ROOT / "benchmarks" / "results" / "profile-cpu.json"
VOID = {"meta", "input"}


class Parsed(HTMLParser):
    """What a page holds.

    open: elements that are not closed. tags: every element with its attributes. tables: the texts of their cells, by
    their captions. scripts: the contents of script elements.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self._caption = ""
        self.feed(html)
        self.close()

    @property
    def text(self) -> str:
        """All text that is shown, with single spaces."""
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._caption = ""
        elif tag == "tr" and "tbody" in self.open:
            self.tables.setdefault(self._caption, []).append([])
        elif tag == "td":
            self.tables[self._caption][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        last = self.open.pop()
        assert last == tag, f"</{tag}> closes <{last}>"

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts.append(data)
            return
        if inside == "style":
            return
        self.texts.append(data)
        if "caption" in self.open:
            self._caption += data
        elif "td" in self.open:
            self.tables[self._caption][-1][-1] += data


@pytest.fixture(scope="session")
def parse() -> Callable[[str], Parsed]:
    return Parsed


@pytest.fixture(scope="session")
def whole() -> Page:
    """A page with every section."""
    pytest.importorskip("vl_convert")
    return powerplan.page(
        "llama-3-8b",
        "8k,128k",
        gpu="h100-sxm",
        devices=64,
        tokens="100B",
        price=2.5,
        measured=PROFILE,
        command="powerplan report llama-3-8b --ctx 8k,128k",
    )


@pytest.fixture(scope="session")
def hostile_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile of an H100 whose mixers have names that are HTML."""
    profile = json.loads(PROFILE.read_text(encoding="utf-8"))
    profile["device"] = "h100-sxm"
    for row in profile["results"]:
        row["name"] = f"<img src=x onerror=alert(1)>{row['name']}"
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    path.write_text(json.dumps(profile), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def plain() -> Page:
    """A page of a model alone."""
    pytest.importorskip("vl_convert")
    return powerplan.page("gpt2-small", "64k")
