"""What reports say of documents of many lengths: what masks between them save, and what sequences they fill."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from powerplan.lengths import Lengths
from powerplan.lengths.flops import DocumentRow
from powerplan.lengths.packing import Packing
from powerplan.report.colour import side_of
from powerplan.report.parts import CONTEXT, json_float, show_flops, show_ratio
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.units import format_parameters, json_number

HALF, MOST = Fraction(1, 2), Fraction(99, 100)

MASKED = (
    "unmasked: every token of a sequence attends to all before it. masked: it attends within its document, and "
    "recurrent state starts anew; documents longer than the context are cut into pieces"
)
"""What the two kinds of columns mean."""

MASKS = (
    f"State FLOPs per token and WSFR. {MASKED}. equal context: unmasked sequences of this context take as many state "
    "FLOPs per token as masked documents do. masks save: share of all FLOPs."
)

PACKING = (
    "padded: one document in each sequence. packed: whole documents, best-fit decreasing over all at once (arXiv "
    "2404.10830). stream: one after another, cut where a sequence ends, the mean over all offsets. padding: share of "
    "the places in sequences that stay empty. cut: share of the documents that are cut; those longer than the context "
    "always are."
)


def lengths_entry(lengths: Lengths) -> dict[str, Any]:
    """Return what JSON says of documents: how many, and their lengths in tokens."""
    return {
        "source": lengths.label,
        "documents": lengths.documents,
        "tokens": lengths.tokens,
        "mean": float(lengths.mean),
        "median": lengths.quantile(HALF),
        "p99": lengths.quantile(MOST),
        "longest": lengths.longest,
        "token_median": lengths.token_quantile(HALF),
    }


def lengths_text(lengths: Lengths) -> list[str]:
    """Return the lines that describe documents."""
    if len(lengths.counts) == 1:
        return wrapped(f"documents of {lengths.longest:,} tokens ({lengths.label})")
    return wrapped(
        f"{lengths.documents:,} documents ({lengths.label}): {float(lengths.mean):,.0f} tokens on average, median "
        f"{lengths.quantile(HALF):,}, 99% up to {lengths.quantile(MOST):,}, longest {lengths.longest:,}; half of all "
        f"tokens are in documents of {lengths.token_quantile(HALF):,} or fewer"
    )


def document_entry(row: DocumentRow) -> dict[str, Any]:
    """Return what JSON says of documents in sequences of one context: numbers that are not rounded."""
    return {
        "state_flops_per_token": json_number(row.state_flops_per_token),
        "flops_per_token": json_number(row.flops_per_token),
        "wsfr": json_float(row.wsfr),
        "equal_context": row.equal_context,
        "masks_save": float(row.saved),
        "cut_documents": row.lengths.longer_than(row.context),
        "pieces": row.pieces.documents,
        "packing": [packing_entry(packing) for packing in row.packings],
    }


def packing_entry(packing: Packing) -> dict[str, Any]:
    """Return what JSON says of one way to fill sequences; of a stream the expected number of documents that are cut."""
    return {
        "way": packing.way,
        "sequences": packing.sequences,
        "padding": float(packing.padding),
        "cut_documents": json_number(packing.cut),
    }


def mask_cells(row: DocumentRow) -> dict[str, Any]:
    """Return the cells of a row that say what masks make of it."""
    return {
        "masked_state_flops_per_token": json_number(row.state_flops_per_token),
        "masked_wsfr": json_float(row.wsfr),
        "equal_context": row.equal_context,
        "masks_save": float(row.saved),
    }


def show_share(value: float) -> str:
    """Show a share as a percentage: with two figures, or three where it is nearly all; very little as that."""
    if 0.995 <= value < 1:
        return f"{math.floor(1000 * value) / 10:.1f}%"
    if abs(value) >= 0.0995:
        return f"{value:.0%}"
    return f"{100 * value:.2g}%" if abs(value) >= 0.0001 or not value else "<0.01%"


MASKED_FLOPS = Column("masked_state_flops_per_token", "state,\nmasked", show_flops)
MASKED_RATIO = Column("masked_wsfr", "WSFR,\nmasked", show_ratio, role=side_of)
EQUAL = Column("equal_context", "equal\ncontext", lambda value: grouped(value) or "-")
SAVED = Column("masks_save", "masks\nsave", show_share)

MASK_COLUMNS = [
    CONTEXT,
    Column("weight_flops_per_token", "weight\nFLOPs", show_flops, raw=True),
    Column("state_flops_per_token", "state,\nunmasked", show_flops),
    MASKED_FLOPS,
    Column("wsfr", "WSFR,\nunmasked", show_ratio, role=side_of),
    MASKED_RATIO,
    EQUAL,
    SAVED,
]

PACKING_COLUMNS = [
    CONTEXT,
    Column("way", "documents", left=True),
    Column("sequences", "sequences", format_parameters),
    Column("padding", "padding", show_share),
    Column("cut_share", "cut", show_share),
]


def packing_rows(rows: Sequence[DocumentRow]) -> list[dict[str, Any]]:
    """Return a row for each way and context."""
    return [
        {"context": row.context, **packing_entry(packing), "cut_share": float(packing.cut / row.lengths.documents)}
        for row in rows
        for packing in row.packings
    ]
