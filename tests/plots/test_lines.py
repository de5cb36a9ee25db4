"""Lines on top of each other show, and names keep off the lines."""

from __future__ import annotations

from itertools import pairwise

from powerplan.plots.figure import panels, styled
from powerplan.plots.lines import (
    AS_IT_IS,
    COLOURS,
    Box,
    Series,
    alike_remarks,
    context_axis,
    draw,
    first_alike,
    level,
    log_axis,
    look,
    upright,
)

CONTEXTS = (1024, 4096, 16_384)


def series(*values: float) -> Series:
    return Series(tuple(zip(map(float, CONTEXTS), values, strict=True)), frozenset([4096.0]))


FLAT, SAME, NEAR, OTHER, EMPTY = (
    series(1, 1, 1),
    series(1, 1, 1),
    series(1.01, 1, 1.01),
    series(100, 10, 1),
    Series(()),
)


def test_lines_that_lie_on_others() -> None:
    assert first_alike([FLAT, OTHER, SAME, NEAR, EMPTY, EMPTY]) == [0, 1, 0, 0, 4, 5]
    assert first_alike([]) == []
    # Alone in a panel whose height is 1 % of a decade, they are apart.
    assert first_alike([FLAT, NEAR]) == [0, 1]


def test_what_a_legend_says_of_them() -> None:
    numbers = ["1", "2", "3"]
    assert alike_remarks(numbers, [FLAT, SAME, OTHER], [FLAT, SAME, OTHER]) == ["", ", on both lines of 1", ""]
    assert alike_remarks(numbers, [FLAT, SAME, OTHER], [FLAT, OTHER, SAME]) == [
        "",
        ", on the line of 1 above",
        ", on the line of 1 below",
    ]


@styled
def test_lines_behind_others_are_wider() -> None:
    _, ((axes,),) = panels([3])
    looks = [look(0), look(1), look(2), AS_IT_IS, look(5)]
    first, other, second, unchanged, solid = draw(axes, [FLAT, OTHER, SAME, NEAR, SAME], looks)
    behind_to_front = [unchanged, first, solid, second]
    assert all(a.get_zorder() < b.get_zorder() for a, b in pairwise(behind_to_front))
    assert all(a.get_linewidth() > b.get_linewidth() for a, b in pairwise(behind_to_front))
    assert second.get_linewidth() == other.get_linewidth()
    assert [line.get_linestyle() for line in behind_to_front] == ["-", "-", "-", "--"]
    assert first.get_markevery() == [1]


def test_looks_differ() -> None:
    looks = [look(place) for place in range(30)]
    assert len({(one.colour, str(one.dashes)) for one in looks}) == 30
    assert AS_IT_IS not in looks
    assert len({one.colour for one in looks[: len(COLOURS)]}) == len(COLOURS)


@styled
def test_names_keep_off_lines_and_off_each_other() -> None:
    _, ((axes,),) = panels([3])
    # A line just above the level leaves room below it alone.
    above = series(1.3, 1.3, 1.3)
    draw(axes, [above, OTHER], [look(0), look(1)])
    context_axis(axes, CONTEXTS)
    log_axis(axes, str, "y")
    level(axes, 1, "the level", [above, OTHER])
    assert axes.texts[0].get_va() == "top"
    taken: list[Box] = []
    for context in (4096, 4100, 4200):
        upright(axes, context, f"{context:,}", [above, OTHER], taken=taken)
    assert len(taken) == 3
    assert not any(one.meets(other) for place, one in enumerate(taken) for other in taken[:place])


@styled
def test_a_level_beyond_the_lines_is_inside_the_panel() -> None:
    _, ((axes,),) = panels([3])
    draw(axes, [series(1, 2, 3)], [look(0)])
    context_axis(axes, CONTEXTS)
    log_axis(axes, str, "y")
    for y in (1000, 0.001):
        level(axes, y, "far")
        low, high = axes.get_ylim()
        assert low < y < high
