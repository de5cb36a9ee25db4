"""`powerplan recommend --solve ... --equal-state`: what holds as much of a sequence as another mixer."""

from __future__ import annotations

from typing import Any

from powerplan.dtypes import Dtypes
from powerplan.report.colour import side_of
from powerplan.report.parts import FLOPS, dtypes_entry, row_entry, show_bytes, show_ratio
from powerplan.report.render import Report
from powerplan.report.solve import SOLVE_SCHEMA
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.search import EqualState, Held
from powerplan.swap import swap_text
from powerplan.units import json_number

_WORDS = {"context": "context", "window": "window in every layer", "p": "degree p in every layer"}


ELEMENTS = "elements: keys and values, or recurrent state without its normaliser and without short convolutions."


def equal_state_report(found: EqualState, name: str, context: int, dtypes: Dtypes) -> Report:
    """Return the report of a question for the same state."""
    other = found.other
    assert other.swap is not None, "what was named is a mixer"
    named = other.swap.describe()
    unit = "" if found.unknown == "p" else " tokens"
    place = "" if found.unknown == "context" else f" at {context:,} tokens"
    same = "as many" if found.at.elements == other.elements else f"and {named} holds {other.elements:,}"
    line = (
        f"{name}{place}: the largest {_WORDS[found.unknown]} that holds no more than {named} is {found.value:,}{unit}: "
        f"{found.at.elements:,} elements per sequence, {same}"
    )
    rows = [_entry(found, held) for held in (other, found.at, found.beyond)]
    payload = {
        "model": name,
        "solve": found.unknown,
        "equal_state": swap_text(other.swap),
        "target": None,
        "context": context,
        "value": found.value,
        "value_by_bytes": found.value_by_bytes,
        "mixer": swap_text(found.at.swap) if found.at.swap else None,
        "dtypes": dtypes_entry(dtypes),
        **dict(zip(("other", "at", "beyond"), rows, strict=True)),
    }
    columns = [
        Column("label", "mixer", left=True),
        Column("held_elements", "elements\nheld", grouped),
        Column("held_bytes", "state per\nsequence", show_bytes),
        *FLOPS,
        Column("wsfr", "WSFR", show_ratio, role=side_of),
    ]
    if found.unknown == "context":
        columns.insert(1, Column("context", "context", grouped))
    return Report(
        SOLVE_SCHEMA,
        payload,
        columns,
        rows,
        title=wrapped(line),
        legend=["", *wrapped(ELEMENTS)],
        after=_after(found, context, dtypes),
    )


def _entry(found: EqualState, held: Held) -> dict[str, Any]:
    return {
        "label": held.swap.describe() if held.swap else "as it is",
        "held_elements": held.elements,
        "held_bytes": json_number(held.bytes),
        **row_entry(held.row),
    }


def _after(found: EqualState, context: int, dtypes: Dtypes) -> list[str]:
    lines = []
    formats = f"cache in {dtypes.cache}, recurrent state in {dtypes.state}, normaliser included"
    if found.value_by_bytes is not None:
        what = f"p={found.value_by_bytes}" if found.unknown == "p" else f"{found.value_by_bytes:,} tokens"
        lines.append(f"If bytes are compared ({formats}) it is {what}.")
    if found.unknown == "window" and found.value > context:
        lines.append(f"At {context:,} tokens attention to every token holds less than this window.")
    if found.heads is not None:
        lines.append(f"Other mixers have {found.heads.describe()} in place of MLA's.")
    return [part for line in lines for part in wrapped(line)]
