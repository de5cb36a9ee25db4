"""`powerplan dims`: dimensions of the power embeddings, and the states of mixers whose state has a fixed size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from powerplan.dims import default_chunk_size, kernels_for, odd_degree, spow_dim, tiled_spow_dim, tpow_dim
from powerplan.errors import InputError, allowed_values, shown
from powerplan.lists import split_words
from powerplan.mixers import MIXERS, SIZED, Mixer, Power
from powerplan.mixers.base import RECURRENT_BYTES
from powerplan.mixers.formulas import SYMBOLS
from powerplan.report.degrees import kernels_lines, kernels_text
from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.swap.windows import held_elements
from powerplan.units import MAX_CONTEXT, format_bytes


def dims_report(head_dims: Sequence[int], degrees: Sequence[int], tile: int, v_head_dim: int | None) -> Report:
    """Return the dimensions of the power embeddings, and the state of one key/value head with each of them."""
    rows = [_power_row(d, p, tile, v_head_dim or d) for d in head_dims for p in degrees]
    columns = [
        Column("head_dim", "head\ndim", grouped),
        Column("p", "p"),
        Column("tpow", "tpow", grouped),
        Column("spow", "spow", grouped),
        Column("tspow", f"tiled spow\n(tile {tile})", grouped),
        Column("savings", "savings", lambda value: f"{value:.1%}"),
        Column("state_bytes", "state\nper head", format_bytes),
        Column("same_state_window", "window of\nsame state", grouped),
        Column("kernels", "kernels", left=True),
    ]
    legend = [
        *wrapped(
            "tpow: d^p, all products of p entries of a key in heads of d. spow: C(d+p-1, p), those that differ, which "
            "the state has a row for. tiled spow: what chunked kernels multiply with."
        ),
        *wrapped(f"savings: 1 - spow/tpow. state per head: fp32, {_state_text(degrees)}."),
        "window of same state: tokens whose keys and values have as many elements as spow x v.",
        *kernels_lines([row["kernels"] for row in rows], degrees),
    ]
    table = [{**row, "kernels": kernels_text(row["kernels"], row["p"])} for row in rows]
    return Report("powerplan.dims/1", {"rows": rows}, columns, table, legend=legend)


def _state_text(degrees: Sequence[int]) -> str:
    """Return how many elements a head's state has: with the normaliser, which odd degrees do not have."""
    odd = [odd_degree(p) for p in degrees]
    if all(odd):
        return "spow x v, as odd p has no normaliser"
    return f"spow x (v + 1), the normaliser included{'; spow x v where p is odd' if any(odd) else ''}"


def _power_row(d: int, p: int, tile: int, v: int) -> dict[str, Any]:
    spow, tpow = spow_dim(d, p), tpow_dim(d, p)
    normaliser = 0 if odd_degree(p) else spow
    return {
        "head_dim": d,
        "p": p,
        "tile": tile,
        "tpow": tpow,
        "spow": spow,
        "tspow": tiled_spow_dim(d, p, tile),
        "savings": float(1 - Fraction(spow, tpow)),
        "v_head_dim": v,
        "state_elements": spow * v,
        "normaliser_elements": normaliser,
        "state_bytes": RECURRENT_BYTES * (spow * v + normaliser),
        "same_state_window": spow * v // (d + v),
        "default_chunk_size": default_chunk_size(d, p),
        "kernels": kernels_for(p, d, v),
        "kernels_normalize": not odd_degree(p),
    }


def _kinds_of_fixed_state() -> list[str]:
    """Return the kinds whose state has the same size at any context, besides power attention.

    Kinds that need their head dim come first, then those with a default for it, then those without a value head dim:
    in this order equal states are listed.
    """
    fixed = []
    for kind, mixer in MIXERS.items():
        head = mixer.one_head(1, 1)
        if head is not None and head.state_size(1) == head.state_size(MAX_CONTEXT):
            fixed.append(kind)
    return sorted(fixed, key=lambda kind: (kind not in SIZED, "v_head_dim" not in MIXERS[kind].__struct_fields__))


KINDS = _kinds_of_fixed_state()
"""Kinds of --kind. Power attention is no choice: it is listed for each degree of --p."""


def parse_kinds(text: str) -> list[str]:
    """Return the kinds that --kind names: of a list, or of "all". Raises InputError for one that is not in KINDS."""
    kinds = split_words(text)
    words = [*KINDS, "all"]
    for kind in kinds:
        if kind not in words:
            problem = f"{shown(kind)} is not a kind with a state of fixed size{allowed_values(kind, words)}"
            raise InputError(problem, "--kind")
    return KINDS if "all" in kinds else list(dict.fromkeys(kinds))


def states_report(head_dims: Sequence[int], degrees: Sequence[int], v_head_dim: int | None, kinds: str) -> Report:
    """Return the state of one head for each kind and for power attention of each degree, the smallest first."""
    rows = []
    for d in head_dims:
        v = v_head_dim or d
        mixers = [mixer for kind in parse_kinds(kinds) if (mixer := MIXERS[kind].one_head(d, v)) is not None]
        mixers += [Power(p=p, heads=1, head_dim=d, v_head_dim=v, normalize=not odd_degree(p)) for p in degrees]
        rows += sorted((_state_row(mixer, d, v) for mixer in mixers), key=lambda row: row["state_elements"])
    columns = [
        Column("head_dim", "head\ndim", grouped),
        Column("mixer", "mixer", left=True),
        Column("formula", "state of a head", lambda value: value.replace("*", "·"), left=True),
        Column("state_elements", "elements", grouped),
        Column("state_bytes", "state\nper head", format_bytes),
        Column("same_state_window", "window of\nsame state", grouped),
    ]
    used = {letter for row in rows for letter in re.findall("[A-Za-z]+", row["formula"])}
    letters = "; ".join(f"{letter} = {meaning}" for letter, meaning in SYMBOLS.items() if letter in used)
    legend = [
        *wrapped(letters),
        *wrapped(
            "state per head: fp32, without the short convolutions; each kind with its defaults (docs/spec.md), power "
            "without the normaliser where p is odd."
        ),
        "window of same state: tokens whose keys and values have as many elements, the normaliser left out.",
    ]
    return Report("powerplan.dims/1", {"states": rows}, columns, rows, legend=legend)


def _state_row(mixer: Mixer, d: int, v: int) -> dict[str, Any]:
    elements = mixer.state_size(1).recurrent
    return {
        "head_dim": d,
        "v_head_dim": v,
        "kind": mixer.kind,
        "mixer": mixer.describe(),
        "formula": re.sub(r"\b[HG]\*", "", mixer.state_terms(1)[0].formula),  # The number of heads is 1.
        "state_elements": elements,
        "state_bytes": RECURRENT_BYTES * elements,
        "same_state_window": held_elements(mixer, 1) // (d + v),
    }
