"""What tests read from figures: lines by their place, names beside lines, legends."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

Points = list[tuple[float, float]]


def lines(axes: Axes) -> list[Points]:
    """Return the points of each line, without those that go across the whole panel."""
    across = (axes.get_xaxis_transform(), axes.get_yaxis_transform())
    own = [line for line in axes.lines if not any(line.get_transform() == transform for transform in across)]
    return [[(float(x), float(y)) for x, y in line.get_xydata()] for line in own]


def marks(axes: Axes, place: int) -> Points:
    """Return the points of a line that have a marker."""
    points, every = lines(axes)[place], axes.lines[place].get_markevery()
    assert isinstance(every, list)
    return [points[index] for index in every]


def names(axes: Axes) -> list[str]:
    """Return the texts beside lines and bars."""
    return [text.get_text() for text in axes.texts if isinstance(text, Annotation)]


def legend(figure: Figure) -> list[str]:
    """Return the rows of the legend."""
    (own,) = figure.legends
    return [text.get_text().strip() for text in own.get_texts()]


def title(figure: Figure) -> str:
    return figure.get_suptitle().strip()


def below(figure: Figure) -> str:
    """Return the line under the title."""
    return figure.texts[-1].get_text().replace("\n", " ")
