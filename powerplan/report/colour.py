"""Quiet colour for text on a terminal. What a colour says, a word or a sign beside it says too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Literal

from powerplan.balance import verdict_of

if TYPE_CHECKING:
    from rich.color import ColorSystem
    from rich.style import Style

Role = Literal["strong", "quiet", "weight", "balanced", "state"]
"""What a piece of text is: a heading, label, verdict or row that matters; an explanation; the side of a ratio."""

_STYLES: dict[Role, str] = {
    "strong": "bold",
    "quiet": "dim",
    "weight": "color(67)",
    "balanced": "color(65)",
    "state": "color(130)",
}
"""Blue, green and brown of the 256: about 4 times lighter than black, and 4 times darker than white."""

_STYLES_OF_16: dict[Role, str] = _STYLES | {"weight": "cyan", "balanced": "green", "state": "yellow"}
"""Where a terminal has 16 colours, whose shades are its own."""

_coloured: ContextVar[bool] = ContextVar("coloured", default=False)


@contextmanager
def colour(wanted: bool) -> Iterator[None]:
    """Let text that is rendered inside a `with` block have colour, or not."""
    token = _coloured.set(wanted)
    try:
        yield
    finally:
        _coloured.reset(token)


def in_colour() -> bool:
    """Whether text is to have colour."""
    return _coloured.get()


def painted(text: str, *roles: Role | None) -> str:
    """Return a text of one line in the style of its roles together; as it is where text has no colour.

    Spaces before and after it stay plain.
    """
    given, inner = tuple(role for role in roles if role is not None), text.strip()
    if not given or not inner or not in_colour():
        return text
    start = text.index(inner)
    many = "256color" in os.environ.get("TERM", "") or os.environ.get("COLORTERM", "") in ("truecolor", "24bit")
    style, system = _style(given, many)
    return f"{text[:start]}{style.render(inner, color_system=system)}{text[start + len(inner) :]}"


def side_of(ratio: float | Fraction | None, target: Fraction | int = 1) -> Role | None:
    """Return the side that is too heavy for `target` at a weight-state FLOP ratio, as a role; None without a state."""
    return None if not ratio else verdict_of(Fraction(ratio), target).side


@cache
def _style(roles: tuple[Role, ...], many: bool) -> tuple[Style, ColorSystem]:
    """Return the style of roles together; many: whether the terminal has 256 colours."""
    from rich.color import ColorSystem  # Only text in colour needs it.
    from rich.style import Style

    style = Style.combine(Style.parse((_STYLES if many else _STYLES_OF_16)[role]) for role in roles)
    return style, ColorSystem.EIGHT_BIT if many else ColorSystem.STANDARD
