"""What every figure has: its formats, its style, its title and legend, and the bytes of its file.

Figures are matplotlib's objects, made without pyplot: neither the backend nor the settings of a notebook change. The
user's own settings do not change a figure either, so that one answer always makes the same file.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from powerplan.errors import InputError, MachineError, parameter
from powerplan.mixers.formulas import Convention
from powerplan.spec import ModelSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Parameters = ParamSpec("Parameters")
Drawn = TypeVar("Drawn")

FORMATS = ("png", "svg", "pdf")
"""Formats of a figure, which are also the suffixes of its file."""

WIDTH = 9.0
"""Inches of a figure."""

MAX_HEIGHT = 400.0
"""Most inches of a figure: the library draws no image of more than 65,536 pixels."""

_STYLE = {
    "font.sans-serif": ["DejaVu Sans"],  # It comes with matplotlib: another font would make another file.
    "font.size": 10,
    "text.parse_math": False,  # A name may hold a dollar sign.
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "lines.dash_capstyle": "butt",
    "lines.solid_capstyle": "butt",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 3.4,
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",  # Text stays text, to be searched and copied.
    "svg.hashsalt": "powerplan",
    "pdf.fonttype": 42,
}

_LEGEND_CHARACTERS = 118
"""Characters that a line of a legend has room for."""

MAX_LABEL = 120
"""Longest label, in characters."""

MAX_NAME = 40
"""Longest name within a label: names of models may have 200."""


def format_of(path: str) -> str:
    """Return the format that a file's suffix names, which may be none of FORMATS: check_plot says so."""
    return Path(path).suffix.lower().removeprefix(".")


def check_plot(path: str | None, where: str) -> None:
    """Raise an error where no figure could be drawn into `path`; None stands for no figure.

    Raises:
        InputError: The suffix names no format.
        MachineError: matplotlib is not installed, or does not load.
    """
    if path is not None:
        if format_of(path) not in FORMATS:
            raise InputError(f"{path} must end in .{', .'.join(FORMATS)}", where)
        check_library()


def check_library() -> None:
    """Raise MachineError where matplotlib is not installed, or does not load."""
    try:
        import matplotlib.figure
        import matplotlib.style  # noqa: F401
    except ImportError as error:
        name = parameter("plot")
        absent = f"{name} needs matplotlib, and it is not installed: pip install matplotlib"
        missing = error.name is not None and error.name.partition(".")[0] == "matplotlib"
        raise MachineError(absent if missing else f"{name}: matplotlib does not load: {error}") from None
    except ValueError as error:  # MPLBACKEND names no backend.
        raise MachineError(f"{parameter('plot')}: matplotlib does not load: {error}") from None


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib.style

    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # A name in another script is drawn as boxes.
        yield


def styled(draw: Callable[Parameters, Drawn]) -> Callable[Parameters, Drawn]:
    """Return a function that draws in the style of powerplan; it raises MachineError where matplotlib is missing."""

    @wraps(draw)
    def in_style(*arguments: Parameters.args, **settings: Parameters.kwargs) -> Drawn:
        check_library()
        with _style():
            return draw(*arguments, **settings)

    return in_style


def panels(
    heights: Sequence[float], *, columns: int = 1, share_x: bool = False, width: float = WIDTH
) -> tuple[Figure, list[list[Axes]]]:
    """Return an empty figure, and its axes as rows of `columns` each; heights: inches of each row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.09)
    figure = Figure(figsize=(width, sum(heights) + 0.5), layout=layout)
    grid = figure.subplots(
        len(heights), columns, squeeze=False, sharex=share_x, gridspec_kw={"height_ratios": list(heights)}
    )
    return figure, [list(row) for row in grid]


def titled(figure: Figure, title: str, below: str) -> None:
    """Give a figure its title, and under it in smaller letters what its numbers follow."""
    from matplotlib.transforms import offset_copy

    lines = wrap(below, 124)
    # The layout leaves room for the title only: its empty lines keep that of the smaller ones.
    figure.suptitle(cut(title, 84) + "\n " * len(lines), x=0.012, ha="left", fontsize=12.5, fontweight="bold")
    corner = offset_copy(figure.transFigure, figure, y=-24, units="points")
    figure.text(0.012, 1, "\n".join(lines), transform=corner, ha="left", va="top", fontsize=9, color="0.35")


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Put a legend under the panels that holds all `labels`; the figure grows by its height."""
    shown = [cut(label) for label in labels]
    if not shown:
        return
    longest = max(map(len, shown), default=0) + 8
    columns = max(1, min(len(shown), _LEGEND_CHARACTERS // longest))
    lines = -(-len(shown) // columns)
    columns = -(-len(shown) // lines)  # No column is left with one entry where the others have more.
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + 0.25 + 0.19 * lines)
    legend = figure.legend(
        handles, [f" {label}" for label in shown], loc="outside lower left", ncols=columns, borderaxespad=0.6
    )
    for text in legend.get_texts():
        text.set_color("0.1")


def name_of(spec: ModelSpec) -> str:
    """Return the name of a model, as labels show it."""
    return cut(spec.name, MAX_NAME)


def cut(label: str, limit: int = MAX_LABEL) -> str:
    """Return a label of at most `limit` characters, with its end as dots where it is longer."""
    return label if len(label) <= limit else f"{label[: limit - 3]}..."


def convention_text(convention: Convention) -> str:
    """Return how FLOPs are counted, in the words of tables."""
    head = "LM head counted" if convention.lm_head else "LM head not counted"
    return f"forward FLOPs per token: {convention.form} form, causal {convention.causal}, {head}"


def figure_bytes(figure: Figure, form: str) -> bytes:
    """Return the file of a figure in one of FORMATS, white behind it; the same figure makes the same bytes.

    Raises:
        InputError: The figure has so many rows that it would be higher than MAX_HEIGHT.
    """
    if (height := figure.get_figheight()) > MAX_HEIGHT:
        problem = f"the figure would be {height:,.0f} inches high; ask for fewer models, contexts or candidates"
        raise InputError(problem, parameter("plot"))
    buffer = io.BytesIO()
    metadata: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with _style():
        figure.savefig(buffer, format=form, dpi=144, facecolor="white", metadata=metadata[form])
    return buffer.getvalue()
