"""`powerplan budget`: what a budget buys, and what it would buy with other mixers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from powerplan.dtypes import Dtypes
from powerplan.hardware import devices as catalogue
from powerplan.lengths.flops import DocumentRow
from powerplan.report.colour import side_of
from powerplan.report.documents import (
    MASKED,
    MASKED_RATIO,
    SAVED,
    document_entry,
    lengths_entry,
    lengths_text,
    mask_cells,
    show_share,
)
from powerplan.report.parts import (
    CONTEXT,
    balance_text,
    convention_entry,
    json_float,
    model_entry,
    parameters_text,
    row_entry,
    show_bytes,
    show_flops,
    show_ratio,
)
from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.swap import swap_text
from powerplan.swap.shapes import replacement_heads
from powerplan.training import RULE, TRAINING_PASSES, Alternative, Bought, Budget, Throughput, TrainingTime
from powerplan.units import (
    format_count,
    format_duration,
    format_figure,
    format_parameters,
    format_quantity,
    json_number,
)

SCHEMA, SEVERAL = "powerplan.budget/1", "powerplan.budgets/1"


def budget_report(bought: Bought, others: Sequence[Alternative], dtypes: Dtypes, batch_tokens: int | None) -> Report:
    """Return the report of a budget; others: the same FLOPs with other mixers, the model as it is first."""
    budget, time = bought.budget, bought.time
    row, spec = budget.row, budget.accounting.spec
    weights, state = TRAINING_PASSES * row.weight_flops_per_token, TRAINING_PASSES * row.state_flops_per_token
    payload: dict[str, Any] = {
        "model": model_entry(budget.accounting),
        "convention": convention_entry(budget.accounting, dtypes),
        "context": row.context,
        "train_flops_per_token": json_number(budget.train_flops_per_token),
        "train_weight_flops_per_token": weights,
        "train_state_flops_per_token": json_number(state),
        "total_flops": json_number(budget.total_flops),
        "tokens": budget.tokens,
        "sequences": budget.sequences,
        "tokens_per_active_parameter": float(budget.tokens_per_parameter),
        "warnings": budget.warnings(),
    }
    lines = [
        f"{spec.name} at {row.context:,} tokens: {format_count(budget.train_flops_per_token)} training FLOPs per "
        f"token, {format_count(weights)} weights + {format_count(state)} state",
        f"{float(budget.total_flops):.4g} FLOPs buy {format_parameters(budget.tokens)} tokens in {budget.sequences:,} "
        f"sequences, {format_figure(budget.tokens_per_parameter)} tokens per active parameter",
    ]
    if batch_tokens is not None:
        payload |= {"batch_tokens": batch_tokens, "steps": budget.steps(batch_tokens)}
        lines.append(f"{budget.steps(batch_tokens):,} optimizer steps of {batch_tokens:,} tokens")
    if time is not None:
        entry, line = _time(budget, time)
        payload |= entry
        lines.append(line)
    columns = _COLUMNS
    if bought.masked is not None and bought.masked.documents is not None:
        documents = bought.masked.documents
        payload |= {"lengths": lengths_entry(documents.lengths), "documents": _masked_entry(bought, batch_tokens)}
        lines += _masked_lines(documents, payload["documents"])
        columns = _MASKED_COLUMNS
    rows = payload["alternatives"] = [_alternative(other, budget, dtypes) for other in others]
    labels = {swap_text(other.swap): other.swap.describe() if other.swap else swap_text(None) for other in others}
    columns = [Column("mixer", "mixer in\nevery layer", labels.__getitem__, left=True), *columns]
    after = ["Not all its layers can take another mixer at the same weights: --mixer asks what one would make of it."]
    table = [row | _masked_cells(other.masked, others[0].masked) for row, other in zip(rows, others, strict=True)]
    if len(rows) == 1:
        return Report(SCHEMA, payload, columns, table, before=lines, after=after)
    return Report(SCHEMA, payload, columns, table, before=lines, legend=["", *_legend(bought, others)])


def _legend(bought: Bought, others: Sequence[Alternative]) -> list[str]:
    """Return what the same FLOPs, weights and state mean in the table of other mixers."""
    row, shape = bought.budget.row, replacement_heads(bought.budget.accounting.spec)
    weights_stay = all(other.budget.row.weight_flops_per_token == row.weight_flops_per_token for other in others)
    gates = "" if weights_stay or shape is not None else " but for gates"
    same_state = (
        "Same state: tokens whose keys and values have as many elements as the recurrent state, in windows of the same "
        "heads, and in the model as it is."
    )
    lines = [
        f"As many FLOPs, and the same weights{gates}, with another mixer in every layer. Training is 3x forward.",
        *wrapped(same_state if bought.masked is None else f"{MASKED}."),
    ]
    if shape is not None:
        lines.append(f"Other mixers have {shape.describe()} in place of MLA's, so that the weights stay.")
    return lines


def budgets_report(rows: Sequence[Bought], dtypes: Dtypes, batch_tokens: int | None) -> Report:
    """Return the report of one budget for several models, several contexts or both."""
    accountings = list(dict.fromkeys(row.budget.accounting for row in rows))
    entries = [_row(row, batch_tokens) for row in rows]
    payload: dict[str, Any] = {
        "convention": convention_entry(accountings[0], dtypes),
        "models": [
            model_entry(accounting) | {"balanced_context": accounting.balanced_context()} for accounting in accountings
        ],
    }
    lines: list[str] = []
    for accounting in accountings:
        lines.append(f"{accounting.spec.name}: {parameters_text(accounting)}; {balance_text(accounting)}")
    columns = [CONTEXT, Column("name", "model", left=True), *_COLUMNS_OF_SEVERAL]
    documents = rows[0].masked.documents if rows[0].masked is not None else None
    if documents is not None:
        payload["lengths"] = lengths_entry(documents.lengths)
        lines += lengths_text(documents.lengths)
        columns[2:] = _MASKED_COLUMNS_OF_SEVERAL
    if batch_tokens is not None:
        payload["batch_tokens"] = batch_tokens
        columns.append(Column("steps", "steps", grouped))
        lines.append(f"Optimizer steps are of {batch_tokens:,} tokens")
    if (time := rows[0].time) is not None:
        payload |= device_entry(time.throughput)
        columns += [_HOURS, *([_DAYS] if time.throughput.devices > 1 else [])]
        if documents is not None:
            columns[-1:] = [replace(columns[-1], heading=f"{columns[-1].heading},\nunmasked")]
            columns.append(Column("masked_days", "time,\nmasked", lambda days: format_duration(days * 86400)))
        measured = [row for row in rows if row.time is not None and row.time.measured is not None]
        part = "state part" if len(measured) == len(rows) else "state part of some"
        lines.append(f"Device hours {f'{part} as measured, the rest ' if measured else ''}{rate_text(time.throughput)}")
    totals = {row.budget.total_flops for row in rows}
    alike = f"As many FLOPs in each row, {float(rows[0].budget.total_flops):.4g}"
    budget = f"{alike}." if len(totals) == 1 else "FLOPs are each row's own."
    legend = wrapped(f"{budget} Training is 3x forward; {RULE}.") + (
        wrapped(f"{MASKED}.") if documents is not None else []
    )
    payload |= {"rows": entries}
    table_rows = [
        entry | _masked_cells(row.masked, row.masked, row.time) for entry, row in zip(entries, rows, strict=True)
    ]
    # A table says what is the same in all its rows beside it; CSV always has the column.
    shown = [column for column in columns if column.key != "total_flops" or len(totals) > 1]
    table = Report(SEVERAL, payload, shown, table_rows, before=lines, legend=legend)
    return Report(SEVERAL, payload, columns, table_rows, sections=[table])


def _row(row: Bought, batch_tokens: int | None) -> dict[str, Any]:
    budget, time = row.budget, row.time
    entry: dict[str, Any] = {"name": budget.accounting.spec.name, "context": budget.row.context}
    entry |= size_entry(budget, batch_tokens) | {"warnings": budget.warnings()}
    if time is not None:
        entry |= _time_entry(budget, time) | {"time_source": _source(time)}
    if row.masked is not None:
        entry["documents"] = _masked_entry(row, batch_tokens)
    return entry


def _masked_entry(row: Bought, batch_tokens: int | None) -> dict[str, Any]:
    """Return what JSON says of a budget over documents that attend to themselves alone."""
    budget, time = row.masked, row.time
    assert budget is not None
    assert budget.documents is not None
    steps = {} if batch_tokens is None else {"steps": budget.steps(batch_tokens)}
    entry = {
        **document_entry(budget.documents),
        "train_flops_per_token": json_number(budget.train_flops_per_token),
        "total_flops": json_number(budget.total_flops),
        "tokens": budget.tokens,
        "tokens_per_active_parameter": float(budget.tokens_per_parameter),
        **steps,
    }
    if time is not None:
        entry |= _time_entry(budget, time)
    return entry


def _masked_lines(documents: DocumentRow, entry: dict[str, Any]) -> list[str]:
    """Return what masks between documents make of a budget, in words."""
    padded, packed, _ = documents.packings
    hours = f", {hours_text(entry['gpu_hours'])} device hours" if "gpu_hours" in entry else ""
    flops, tokens = format_count(Fraction(entry["train_flops_per_token"])), format_parameters(entry["tokens"])
    as_long = "" if documents.equal_context is None else f", as in sequences of {documents.equal_context:,} tokens"
    cut = show_share(float(packed.cut / documents.lengths.documents))
    return [
        *lengths_text(documents.lengths),
        *wrapped(
            f"with document masks: {flops} training FLOPs per token{as_long}; {entry['total_flops']:.4g} FLOPs buy "
            f"{tokens} tokens{hours}"
        ),
        *wrapped(
            f"packed whole into {format_parameters(packed.sequences)} sequences: {show_share(float(packed.padding))} "
            f"padding, {cut} of the documents cut; one document in each: {show_share(float(padded.padding))} padding"
        ),
    ]


def _masked_cells(budget: Budget | None, base: Budget | None, time: TrainingTime | None = None) -> dict[str, Any]:
    """Return the cells of a table that say what masks make of a row; base: the budget of the model as it is."""
    if budget is None or budget.documents is None or base is None:
        return {}
    cells = mask_cells(budget.documents) | {
        "masked_tokens": budget.tokens,
        "masked_times_as_many_tokens": float(base.train_flops_per_token / budget.train_flops_per_token),
    }
    if time is not None:
        cells["masked_days"] = time.days(budget)
    return cells


def size_entry(budget: Budget, batch_tokens: int | None) -> dict[str, Any]:
    """Return what JSON says of a budget of one model at one context, in a row of several."""
    row = row_entry(budget.row)
    steps = {} if batch_tokens is None else {"steps": budget.steps(batch_tokens)}
    return {
        "wsfr": row["wsfr"],
        "train_flops_per_token": json_number(budget.train_flops_per_token),
        "total_flops": json_number(budget.total_flops),
        "tokens": budget.tokens,
        "sequences": budget.sequences,
        "tokens_per_active_parameter": float(budget.tokens_per_parameter),
        "state_bytes": row["state_bytes"],
        **steps,
    }


def device_entry(rate: Throughput) -> dict[str, Any]:
    """Return what JSON says of the devices that hours are counted on."""
    return {"device": rate.peak.name, "mfu": float(rate.mfu), "devices": rate.devices}


def rate_text(rate: Throughput) -> str:
    """Return how fast a device is taken to be: "on h100-sxm at 40 % of the bf16 peak, 395.6 TFLOP/s"."""
    return f"on {rate.peak.name} at {_share_text(rate)}, {format_quantity(rate.flops_per_s, 'FLOP/s')}"


def _share_text(rate: Throughput) -> str:
    return f"{float(rate.mfu * 100):.4g}% of {rate.peak.kind}"


def hours_text(hours: float) -> str:
    """Return device hours in whole numbers from 10 hours on, else with three figures."""
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.3g}"


def _source(time: TrainingTime) -> str:
    return "measured" if time.measured is not None else "mfu"


def _time_entry(budget: Budget, time: TrainingTime) -> dict[str, float]:
    return {"gpu_hours": time.gpu_hours(budget), "days": time.days(budget)}


def _time(budget: Budget, time: TrainingTime) -> tuple[dict[str, Any], str]:
    """Return what JSON says of the time of a budget, and a line of text."""
    rate = time.throughput
    entry = {**device_entry(rate), **_time_entry(budget, time), "time_source": _source(time)}
    devices = f"{rate.devices:,} devices" if rate.devices > 1 else "one device"
    share = f"at {_share_text(rate)}"
    if time.measured is not None:
        work = f"device hours, state part as measured in {time.source}, weights {share}"
    else:
        # A device that only a profile has is named by a description: "2 cores, x86_64, AVX512".
        unit = f"{rate.peak.name} hours" if rate.peak.name in catalogue() else f"device hours ({rate.peak.name})"
        work = f"{unit} {share}, {format_quantity(rate.flops_per_s, 'FLOP/s')}"
    duration = format_duration(time.device_seconds(budget) / rate.devices)
    return entry, f"{hours_text(time.gpu_hours(budget))} {work}: {duration} on {devices}"


def _alternative(other: Alternative, base: Budget, dtypes: Dtypes) -> dict[str, Any]:
    budget, row, masked = other.budget, row_entry(other.budget.row), other.masked
    documents = {}
    if masked is not None and masked.documents is not None:
        documents = {
            "documents": {
                "wsfr": json_float(masked.documents.wsfr),
                "train_flops_per_token": json_number(masked.train_flops_per_token),
                "tokens": masked.tokens,
            }
        }
    return {
        "mixer": swap_text(other.swap),
        "wsfr": row["wsfr"],
        "train_flops_per_token": json_number(budget.train_flops_per_token),
        "tokens": budget.tokens,
        "times_as_many_tokens": float(base.train_flops_per_token / budget.train_flops_per_token),
        "state_bytes": row["state_bytes"],
        "params_active": budget.parameters,
        "same_state_window": other.same_state_window,
        "same_state_context": other.same_state_context,
        "dtype": dtypes.dtype,
        **documents,
    }


_COLUMNS = [
    Column("wsfr", "WSFR", show_ratio, role=side_of),
    Column("train_flops_per_token", "FLOPs\nper token", show_flops),
    Column("tokens", "tokens", format_parameters),
    Column("times_as_many_tokens", "against\nas is", lambda value: f"{value:.2f}x"),
    Column("state_bytes", "state per\nsequence", show_bytes),
    Column("same_state_window", "window of\nsame state", lambda value: grouped(value) or "-"),
    Column("same_state_context", "context of\nsame state", lambda value: grouped(value) or "-"),
]

_COLUMNS_OF_SEVERAL = [
    Column("wsfr", "WSFR", show_ratio, role=side_of),
    Column("train_flops_per_token", "FLOPs\nper\ntoken", show_flops),
    Column("total_flops", "FLOPs\nin all", show_flops),
    Column("tokens", "tokens", format_parameters),
    Column("sequences", "sequences", format_parameters),
    Column("tokens_per_active_parameter", "tokens per\nparameter", format_figure),
]
_HOURS = Column("gpu_hours", "device\nhours", hours_text)
_DAYS = Column("days", "time", lambda days: format_duration(days * 86400))

_MASKED_COLUMNS = [
    Column("wsfr", "WSFR,\nunmasked", show_ratio, role=side_of),
    MASKED_RATIO,
    Column("tokens", "tokens,\nunmasked", format_parameters),
    Column("masked_tokens", "tokens,\nmasked", format_parameters),
    Column("times_as_many_tokens", "as is,\nunmasked", lambda value: f"{value:.2f}x"),
    Column("masked_times_as_many_tokens", "as is,\nmasked", lambda value: f"{value:.2f}x"),
    Column("state_bytes", "state per\nsequence", show_bytes),
    *(
        replace(column, raw=True)
        for column in _COLUMNS
        if column.key not in ("wsfr", "tokens", "times_as_many_tokens", "state_bytes")
    ),
]
"""Those of a budget over documents. Beside the model as it is: as many tokens times that."""

_MASKED_COLUMNS_OF_SEVERAL = [
    Column("wsfr", "WSFR,\nunmasked", show_ratio, role=side_of),
    MASKED_RATIO,
    Column("train_flops_per_token", "FLOPs per token", show_flops, raw=True),
    Column("total_flops", "FLOPs\nin all", show_flops),
    Column("tokens", "tokens,\nunmasked", format_parameters),
    Column("masked_tokens", "tokens,\nmasked", format_parameters),
    SAVED,
]
