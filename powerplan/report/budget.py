"""`powerplan budget`: what a budget buys, and what it would buy with other mixers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from powerplan.budget import TRAINING, Alternative, Budget, Rate
from powerplan.hardware import devices as catalogue
from powerplan.report.parts import convention_entry as convention_of
from powerplan.report.parts import model_entry as model_of
from powerplan.report.parts import show_bytes, show_ratio
from powerplan.report.render import Column, Report
from powerplan.swaps import AS_IS, default_shape, short
from powerplan.units import format_count, format_duration, format_parameters, json_number

SCHEMA = "powerplan.budget/1"


@dataclass(frozen=True)
class Clock:
    """How the time of a budget is found: a rate, or (`measured`) a saved profile's seconds per training token."""

    rate: Rate
    measured: float | None = None
    source: str | None = None

    def device_seconds(self, budget: Budget) -> float:
        if self.measured is not None:
            return self.measured * budget.tokens
        return float(budget.total_flops / self.rate.flops_per_s)

    def describe(self) -> str:
        share = f"at {_percent(self.rate.mfu)} of {self.rate.peak.kind}"
        if self.measured is not None:
            return f"state part as measured in {self.source}, weights {share}"
        return f"{share}, {format_count(self.rate.flops_per_s)}FLOP/s"


def _percent(share: Fraction) -> str:
    return f"{float(share * 100):.4g} %"


def budget_report(
    budget: Budget, others: Sequence[Alternative], dtype: str, batch_tokens: int | None, clock: Clock | None
) -> Report:
    """Return the report of a budget; others: the same FLOPs with other mixers, the model as it is first."""
    row = budget.row
    payload: dict[str, Any] = {
        "model": model_of(budget.accounting),
        "convention": convention_of(budget.accounting, dtype),
        "context": row.context,
        "train_flops_per_token": json_number(budget.train_flops_per_token),
        "train_weight_flops_per_token": TRAINING * row.weight_flops,
        "train_state_flops_per_token": json_number(TRAINING * row.state_flops),
        "total_flops": json_number(budget.total_flops),
        "tokens": budget.tokens,
        "sequences": budget.sequences,
        "tokens_per_active_parameter": budget.tokens / budget.parameters,
        "warnings": budget.warnings(),
    }
    weights, state = format_count(TRAINING * row.weight_flops), format_count(TRAINING * row.state_flops)
    lines = [
        f"{budget.accounting.spec.name} at {row.context:,} tokens: {format_count(budget.train_flops_per_token)} "
        f"training FLOPs per token, {weights} weights + {state} state",
        f"{float(budget.total_flops):.4g} FLOPs buy {format_parameters(budget.tokens)} tokens in {budget.sequences:,} "
        f"sequences, {_figure(Fraction(budget.tokens, budget.parameters))} tokens per active parameter",
    ]
    if batch_tokens is not None:
        payload |= {"batch_tokens": batch_tokens, "steps": budget.steps(batch_tokens)}
        lines.append(f"{budget.steps(batch_tokens):,} optimiser steps of {batch_tokens:,} tokens")
    if clock is not None:
        entry, line = _time(budget, clock)
        payload |= entry
        lines.append(line)
    payload["alternatives"] = [_alternative(other, budget, dtype) for other in others]
    rows = payload["alternatives"]
    after = ["Not all its layers can take another mixer at the same weights: --mixer asks what one would make of it."]
    if len(rows) == 1:
        return Report(SCHEMA, payload, _COLUMNS, rows, before=lines, after=after)
    shape = default_shape(budget.accounting.spec)
    weights_stay = all(other.budget.row.weight_flops == row.weight_flops for other in others)
    gates = "" if weights_stay or shape is not None else " but for gates"
    after = [
        f"As many FLOPs, and the same weights{gates}, with another mixer in every layer. Training is 3x forward.",
        "Same state: tokens whose keys and values have as many elements as the recurrent state, in windows",
        "of the same heads, and in the model as it is.",
    ]
    if shape is not None:
        after.append(f"Other mixers have {shape.describe()} in place of MLA's, so that the weights stay.")
    return Report(SCHEMA, payload, _COLUMNS, rows, before=lines, after=after)


def _time(budget: Budget, clock: Clock) -> tuple[dict[str, Any], str]:
    seconds, rate = clock.device_seconds(budget), clock.rate
    entry = {
        "device": rate.peak.name,
        "mfu": float(rate.mfu),
        "devices": rate.devices,
        "gpu_hours": seconds / 3600,
        "days": seconds / 86400 / rate.devices,
        "time_source": "measured" if clock.measured is not None else "mfu",
    }
    hours = f"{seconds / 3600:,.0f}" if seconds >= 36_000 else f"{seconds / 3600:.3g}"
    devices = f"{rate.devices:,} devices" if rate.devices > 1 else "one device"
    # A device that only a profile has is named by a description: "2 cores, x86_64, AVX512".
    unit = f"{rate.peak.name} hours" if rate.peak.name in catalogue() else f"device hours ({rate.peak.name})"
    unit = unit if clock.measured is None else "device hours,"
    line = f"{hours} {unit} {clock.describe()}: {format_duration(seconds / rate.devices)} on {devices}"
    return entry, line


def _figure(value: Fraction) -> str:
    number = float(f"{float(value):.3g}")
    return f"{number:,.10g}"


def _alternative(other: Alternative, base: Budget, dtype: str) -> dict[str, Any]:
    budget = other.budget
    wsfr = budget.row.wsfr
    return {
        "mixer": other.mixer,
        "wsfr": float(wsfr) if wsfr is not None else None,
        "train_flops_per_token": json_number(budget.train_flops_per_token),
        "tokens": budget.tokens,
        "times_as_many_tokens": float(base.train_flops_per_token / budget.train_flops_per_token),
        "state_bytes": json_number(budget.row.state_bytes),
        "params_active": budget.parameters,
        "same_state_window": other.same_window,
        "same_state_context": other.same_context,
        "dtype": dtype,
    }


def _or_dash(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


_COLUMNS = [
    Column(
        "mixer", "mixer in\nevery layer", lambda text: text if text == AS_IS else short(text, shaped=False), left=True
    ),
    Column("wsfr", "WSFR", show_ratio),
    Column("train_flops_per_token", "FLOPs\nper token", lambda value: format_count(Fraction(value))),
    Column("tokens", "tokens", format_parameters),
    Column("times_as_many_tokens", "against\nas is", lambda value: f"{value:.2f}x"),
    Column("state_bytes", "state per\nsequence", show_bytes),
    Column("same_state_window", "window of\nsame state", _or_dash),
    Column("same_state_context", "context of\nsame state", _or_dash),
]
