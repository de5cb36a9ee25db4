"""Tables are laid out as the package tabulate lays them out: it is the oracle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tabulate import tabulate

from powerplan.report.grid import grid

TEXTS = st.text("ab 12,.é|-", max_size=12) | st.sampled_from(["one\ntwo", " a\n  b ", "long " * 8, "1:4.89", ""])
HEADINGS = st.text("ab -\n", min_size=1, max_size=16)


@pytest.mark.parametrize("form", ["simple", "pipe"])
@given(data=st.data(), columns=st.integers(1, 4), rows=st.integers(1, 4))
def test_a_grid_is_what_tabulate_prints(form: str, data: st.DataObject, columns: int, rows: int) -> None:
    headings = data.draw(st.lists(HEADINGS, min_size=columns, max_size=columns))
    texts = [data.draw(st.lists(TEXTS, min_size=rows, max_size=rows)) for _ in range(columns)]
    texts[0] = [text if text.strip() else "x" for text in texts[0]]  # Tabulate leaves a row out that has no text.
    left = data.draw(st.lists(st.booleans(), min_size=columns, max_size=columns))
    expected = tabulate(
        list(zip(*texts, strict=True)),
        headers=headings,
        tablefmt=form,
        colalign=["left" if own else "right" for own in left],
        disable_numparse=True,
    )
    assert grid(headings, texts, left, markdown=form == "pipe") == expected


def test_a_row_without_text_stays_a_row() -> None:
    assert grid(["a"], [["x", "", "y"]], [True]) == "a\n---\nx\n\ny"
