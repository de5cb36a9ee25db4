"""What a page is made of, as plain data: figures, tables, bars, strips of layers, curves. No HTML is in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from powerplan.report.tables import Column

DASHES: dict[str, tuple[int, ...]] = {
    "var(--k0)": (),
    "var(--k1)": (),
    "var(--k2)": (14, 4),
    "var(--k3)": (7, 5),
    "var(--k4)": (3, 4),
    "var(--k5)": (14, 4, 3, 4),
    "var(--k6)": (7, 4, 2, 4),
    "var(--k7)": (2, 3),
    "var(--k8)": (10, 8),
}
"""The dashes of curves by their colours in style.css: a curve that lies on another leaves gaps for it."""

AS_IT_IS, *CANDIDATES = DASHES
"""The colour of the model as it is, and those of the candidates in order, as many as charts draw."""

HUES = 8
"""Colours of kinds of layers, and of parts of memory and time, that style.css has."""


@dataclass(frozen=True)
class Figure:
    """One number to be read at a glance: what it is, the number with its unit, and a remark."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table of texts.

    left: for each column, whether it is aligned to the left. colours: of rows, or of no row. remarks: a sentence below
    each row, or none below any.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: tuple[bool, ...]
    colours: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A part of a bar: its share of the bar's length, its amount in words, its colour."""

    name: str
    share: float
    text: str
    colour: str


@dataclass(frozen=True)
class Bar:
    """Amounts that add up, side by side. whole: their sum in words. limit: where a labelled line crosses the bar."""

    title: str
    whole: str
    parts: tuple[Part, ...]
    limit: tuple[float, str] | None = None


@dataclass(frozen=True)
class Strip:
    """The layers of a model in their order. cells: for each layer its colour and what it is."""

    title: str
    description: str
    cells: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a colour and its meaning."""

    colour: str
    text: str


@dataclass(frozen=True)
class Point:
    """A point of a curve, and its value as people read it."""

    x: int
    y: float
    text: str


@dataclass(frozen=True)
class Curve:
    """A curve of a chart.

    key: what the chart's data and its legend call it. shown: whether it is drawn at first. dash: lengths of its dashes
    and gaps, in pixels; solid where empty.
    """

    key: str
    name: str
    colour: str
    points: tuple[Point, ...]
    shown: bool = True
    dash: tuple[int, ...] = ()

    @property
    def stroke(self) -> str:
        """The dashes as SVG writes them."""
        return " ".join(map(str, self.dash)) or "none"


@dataclass(frozen=True)
class Mark:
    """A labelled line across a chart. asked: whether it marks what the reader asked about, and is drawn stronger."""

    at: float
    label: str
    asked: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart: the id of its place in the page, its title, its Vega-Lite spec, and its figures as a table."""

    key: str
    title: str
    spec: dict[str, Any]
    table: Table


def table_from(caption: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table of a report, as the command line shows its values."""
    shown = [column for column in columns if not column.raw]
    return Table(
        caption=caption,
        head=tuple(column.heading.replace("-\n", "").replace("\n", " ") for column in shown),
        rows=tuple(tuple(column.show(row.get(column.key)) for column in shown) for row in rows),
        left=tuple(column.left for column in shown),
    )


def curves_table(caption: str, curves: Sequence[Curve]) -> Table:
    """Return the points of curves over the context: one row for each context, one column for each curve."""
    texts = [{point.x: point.text for point in curve.points} for curve in curves]
    places = sorted({x for own in texts for x in own})
    return Table(
        caption=caption,
        head=("context", *(curve.name for curve in curves)),
        rows=tuple((f"{x:,}", *(own.get(x, "-") for own in texts)) for x in places),
        left=(False,) * (len(curves) + 1),
    )
