"""`powerplan dims --model`: what a model carries with power attention of each degree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from powerplan.accounting import Accounting, Row
from powerplan.dims import kernels_for, odd_degree, spow_dim, tiled_spow_dim
from powerplan.dtypes import Dtypes
from powerplan.mixers import Power
from powerplan.mixers.base import RECURRENT_BYTES
from powerplan.report.colour import side_of
from powerplan.report.parts import FLOPS, convention_entry, row_entry, show_bytes, show_ratio
from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.swap import swap_text
from powerplan.swap.degrees import Degree

SCHEMA = "powerplan.dims/1"


def degrees_report(
    accounting: Accounting, row: Row, degrees: Sequence[Degree], largest: Degree | None, tile: int
) -> Report:
    """Return the report of a model with several degrees; `row` holds the numbers of the model as it is."""
    rows = [_row(degree, mixer, layers, tile) for degree in degrees for mixer, layers in degree.mixers]
    spec, shapes = accounting.spec, {mixer.own_heads() for degree in degrees for mixer, _ in degree.mixers}
    payload = {
        "model": spec.name,
        "convention": convention_entry(accounting, Dtypes()),
        "context": row.context,
        "as_it_is": row_entry(row),
        "largest_p": largest.p if largest else None,
        "totals": rows,
    }
    several = len(shapes) > 1
    columns = [
        Column("p", "p"),
        *([Column("shape", "heads", left=True)] if several else []),
        *(Column(key, heading, grouped, raw=key != "layers" or not several) for key, heading in _HEADS),
        Column("spow", "spow", grouped),
        Column("state_bytes_per_head", "state\nper head", show_bytes),
        Column("state_bytes_per_layer", "state\nper layer", show_bytes),
        Column("state_bytes", "state per\nsequence", show_bytes),
        Column("same_state_window", "window of\nsame state", grouped),
        *FLOPS,
        Column("wsfr", "WSFR", show_ratio, role=side_of),
        Column("kernels", "kernels", left=True),
    ]
    table = [{**entry, "kernels": kernels_text(entry["kernels"], entry["p"])} for entry in rows]
    layers = sum(count for _, count in degrees[0].mixers)
    uniform = "" if several else f" of {next(iter(shapes)).describe()}"
    title = [
        *wrapped(f"{spec.name} at {row.context:,} tokens as it is: {show_ratio(row.wsfr)}, {_state(row)}"),
        *wrapped(_verdict(degrees, largest)),
    ]
    before = wrapped(f"with power attention in all {layers} layers{uniform}:")
    return Report(SCHEMA, payload, columns, table, title=title, before=before, legend=["", *_legend(degrees)])


_HEADS = (("layers", "layers"), ("head_dim", "head\ndim"), ("kv_heads", "kv\nheads"))


def _state(row: Row) -> str:
    return f"state {show_bytes(row.state_bytes)} per sequence"


def _row(degree: Degree, mixer: Power, layers: int, tile: int) -> dict[str, Any]:
    heads, totals = mixer.kv_heads, row_entry(degree.row)
    elements = mixer.state_size(1).recurrent
    return {
        "p": degree.p,
        "mixer": swap_text(degree.swap),
        "layers": layers,
        "shape": mixer.own_heads().label(),
        "heads": mixer.heads,
        "kv_heads": heads,
        "head_dim": mixer.head_dim,
        "v_head_dim": mixer.v_head_dim,
        "normalize": mixer.normalize,
        "kernels": kernels_for(degree.p, mixer.head_dim, mixer.v_head_dim),
        "spow": spow_dim(mixer.head_dim, degree.p),
        "tile": tile,
        "tspow": tiled_spow_dim(mixer.head_dim, degree.p, tile),
        "state_elements_per_head": elements // heads,
        "state_bytes_per_head": RECURRENT_BYTES * elements // heads,
        "state_bytes_per_layer": RECURRENT_BYTES * elements,
        "same_state_window": degree.same_state_window,
        **{key: totals[key] for key in _TOTALS},
    }


_TOTALS = ("state_elements", "state_bytes", "weight_flops_per_token", "state_flops_per_token", "wsfr")


def kernels_text(kernels: Sequence[str], p: int) -> str:
    """Return the kernels of a degree in words: "none", "torch", "triton" or "triton, Hopper engine".

    Those of odd degrees take no normaliser, which is added.
    """
    if not kernels:
        return "none"
    text = "triton, Hopper engine" if "hopper" in kernels else kernels[-1]
    return f"{text}, no normaliser" if odd_degree(p) else text


def kernels_lines(kernels: Sequence[Sequence[str]], degrees: Sequence[int]) -> list[str]:
    """Return what the column of kernels says, as far as these rows need it."""
    lines = ["kernels: what powerplan.kernels runs in bf16; torch on any device, triton on GPUs."]
    if any("hopper" in engines for engines in kernels):
        lines[0] = f"{lines[0][:-1]}, the Hopper engine on compute capability 9.0."
    if any(map(odd_degree, degrees)):
        lines.append("Odd p gives weights of both signs, whose sum may be 0: kernels need normalize: false.")
    return [part for line in lines for part in wrapped(line)]


def _verdict(degrees: Sequence[Degree], largest: Degree | None) -> str:
    ranked = sorted(degrees, key=lambda degree: degree.p)
    if largest is None:
        first = ranked[0]
        return f"no p here leaves the weight FLOPs at 1:1 or more: p={first.p} has {show_ratio(first.row.wsfr)}"
    beyond = next((degree for degree in ranked if degree.p > largest.p), None)
    rest = f"; p={beyond.p} has {show_ratio(beyond.row.wsfr)}" if beyond else ""
    found = f"largest p here at 1:1 or more: p={largest.p}, {show_ratio(largest.row.wsfr)}"
    return f"{found}, {_state(largest.row)}{rest}"


def _legend(degrees: Sequence[Degree]) -> list[str]:
    kernels = [
        kernels_for(degree.p, mixer.head_dim, mixer.v_head_dim) for degree in degrees for mixer, _ in degree.mixers
    ]
    chosen = [degree.p for degree in degrees]
    where = " where p is even" if any(map(odd_degree, chosen)) else ""
    return [
        *wrapped(
            "spow: C(d+p-1, p) in heads of d, the products of p entries of a key that differ: the state has a row for "
            "each."
        ),
        *wrapped(f"state: fp32, normaliser included{where}. FLOPs: forward, per token."),
        *wrapped("window of same state: tokens whose keys and values, in the same heads, have as many elements."),
        *kernels_lines(kernels, chosen),
    ]
