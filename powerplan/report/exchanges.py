"""What layers pass on along a sequence that several devices share: a section of `powerplan train`, and its JSON."""

from __future__ import annotations

from typing import Any

from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.run.exchanges import INPUTS, KEYS, STATE, WINDOW
from powerplan.run.layouts import Layout
from powerplan.run.passing import Passing, Split, break_even, crossover
from powerplan.units import format_figure

LEGEND = (
    "For one layer in a forward pass: what a device sends to others and gets from them, how long that takes, and how "
    "much of that time no compute hides. What a gather sends to all others counts once."
)
"""What the columns mean."""

CROSSOVER = (
    "faster from, smaller from: with this many tokens per device or more, a state takes less time (forward and "
    "backward), or has fewer bytes, than keys and values of the same heads in a ring or from all to all."
)
"""What the columns of states mean."""


LATENTS = "latents"
"""What mla passes on for keys and values."""

WAYS = {
    (KEYS, "ring"): "keys, values: ring",
    (KEYS, "all-to-all"): "heads: all-to-all",
    (LATENTS, "ring"): "latents: ring",
    (LATENTS, "all-to-all"): "heads: all-to-all",
    (WINDOW, "halo"): "window: halo",
    (WINDOW, "all-to-all"): "heads: all-to-all",
    (STATE, "gather"): "state: gather",
    (STATE, "scan"): "state: scan",
    (INPUTS, "halo"): "last inputs: halo",
}
"""What layers pass on, and how, as the table has it."""


def exchange_entries(layout: Layout) -> list[dict[str, Any]]:
    """Return what the layers of the slowest stage pass on, kind by kind; nothing where one device has all tokens."""
    split = layout.split
    return [] if split is None else [_entry(passing, split) for passing in layout.step.passings]


def _entry(passing: Passing, split: Split) -> dict[str, Any]:
    exchange, crossed = passing.exchange, crossover(passing, split)
    state = exchange.what == STATE
    return {
        "way": "state" if state else passing.way,
        "layers": passing.layers,
        "bytes_sent_per_layer": passing.bytes_sent,
        "exposed_s": passing.exposed_s,
        "break_even_tokens": break_even(exchange, split),
        "mixer": exchange.mixer,
        "passed": LATENTS if exchange.latent else exchange.what,
        "exchange": passing.way if state else None,
        "rounds": passing.rounds,
        "parts_per_device": split.parts,
        "tokens_per_device": round(split.tokens),
        "bytes_received_per_layer": passing.bytes_received,
        "seconds": passing.seconds,
        "faster_from_tokens": crossed.tokens if crossed else None,
        "faster_than": crossed.against if crossed else None,
    }


def exchange_section(schema: str, layout: Layout) -> Report | None:
    """Return the table of what layers pass on; None where one device has all tokens of a sequence, or layers none."""
    split, entries = layout.split, exchange_entries(layout)
    if split is None or not entries:
        return None
    rows = [_row(entry) for entry in entries]
    parts = ", a part from the front and one from the back" if split.parts == 2 else ""
    title = f"one sequence over {split.ranks:,} devices, {round(split.tokens):,} tokens on each{parts}"
    if layout.degrees.pp > 1:
        title += "; layers of the slowest pipeline stage"
    columns = [
        Column("layers", "layers", left=True),
        Column("how", "pass on", left=True),
        Column("sent", "MB\nsent", format_figure),
        Column("received", "MB\ngot", format_figure),
        Column("ms", "ms", format_figure),
        Column("exposed", "not\nhidden", format_figure),
    ]
    states = any(entry["passed"] == STATE for entry in entries)
    if states:
        columns.append(Column("faster", "faster\nfrom", grouped))
        columns.append(Column("large", "smaller\nfrom", grouped))
    legend = [*wrapped(LEGEND), *(wrapped(CROSSOVER) if states else ())]
    return Report(schema, {}, columns, rows, title=wrapped(title), legend=legend, after=_remarks(rows))


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    layers = entry["layers"] or 1
    return {
        "layers": f"{entry['layers']} {entry['mixer']}",
        "mixer": entry["mixer"],
        "how": WAYS[entry["passed"], entry["exchange"] or entry["way"]],
        "sent": entry["bytes_sent_per_layer"] / 1e6,
        "received": entry["bytes_received_per_layer"] / 1e6,
        "ms": entry["seconds"] / layers * 1e3,
        "exposed": entry["exposed_s"] / layers * 1e3,
        "faster": entry["faster_from_tokens"],
        "large": entry["break_even_tokens"],
        "tokens": entry["tokens_per_device"],
    }


def _remarks(rows: list[dict[str, Any]]) -> list[str]:
    """Return for which layers keys and values would take less time than their state."""
    lines = []
    for row in rows:
        if row["faster"] is not None and row["tokens"] < row["faster"]:
            lines += wrapped(
                f"{row['mixer']}: with {row['tokens']:,} tokens on each device, keys and values of the same heads "
                f"would take less time than its state, as up to {row['faster'] - 1:,}"
            )
    return lines
