"""The report of `powerplan decode`: what serving takes at each context and batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from operator import itemgetter
from typing import Any

from powerplan.accounting import Accounting
from powerplan.caches.policy import Policy
from powerplan.dtypes import Dtypes
from powerplan.errors import listed
from powerplan.report.parts import (
    CONTEXT,
    dtypes_entry,
    json_float,
    model_entry,
    parameters_text,
    show_bytes,
    weights_text,
)
from powerplan.report.policies import fitting, policy_entry, policy_lines, policy_remarks, serving_entry
from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped
from powerplan.report.width import wrapped
from powerplan.serving import Fleet, Serving, Step
from powerplan.units import format_bytes, format_count, format_duration, format_figure, format_quantity, json_number

SCHEMA = "powerplan.decode/1"

_STATES = ("cache_bytes", "recurrent_bytes")
"""Columns of state, which a table has where a row of it has any."""


@dataclass(frozen=True)
class Served:
    """A model that is served, and what serving it takes at each context.

    servings: one for each context. twin_of: None, or the place of another model in the same list and the kind of
    mixer, "mla" or "attention", that this twin of it has in every layer.
    """

    accounting: Accounting
    servings: tuple[Serving, ...]
    twin_of: tuple[int, str] | None = None

    @property
    def label(self) -> str:
        return f"{self.twin_of[1]} twin" if self.twin_of else self.accounting.spec.name


def decode_report(models: Sequence[Served], batches: Sequence[int], dtypes: Dtypes, fleet: Fleet | None) -> Report:
    """Return the report of what serving models at the same contexts takes, with twins beside their models."""
    contexts = [serving.context for serving in models[0].servings]
    policy = models[0].servings[0].policy
    entries = [
        model_entry(model.accounting)
        | {
            "twin_of": models[model.twin_of[0]].accounting.spec.name if model.twin_of else None,
            "stored_bytes": json_number(model.servings[0].stored_bytes),
            "host_bytes": json_number(model.servings[0].host_bytes),
            "contexts": [_context(serving, batches) for serving in model.servings],
        }
        for model in models
    ]
    payload: dict[str, Any] = {
        **dtypes_entry(dtypes),
        "device": fleet.device.name if fleet else None,
        "devices": fleet.count if fleet else None,
        "memory_bytes": fleet.memory if fleet else None,
        "cache_bits": json_number(8 * dtypes.cache_bytes),
        "policy": policy_entry(policy),
        "models": entries,
        "twins": [
            _against_twin(serving, twin, batches)
            for model in models
            if model.twin_of
            for serving, twin in zip(models[model.twin_of[0]].servings, model.servings, strict=True)
        ],
    }
    rows = [
        {"name": model.accounting.spec.name, "context": context, **step}
        for place, context in enumerate(contexts)
        for model, entry in zip(models, entries, strict=True)
        for step in entry["contexts"][place]["steps"]
    ]
    before = [line for model in models for line in _facts(model)]
    after = [line for entry in payload["twins"] for line in _twin_lines(entry)]
    labels = {model.accounting.spec.name: model.label for model in models}
    name = Column("name", "model", labels.__getitem__, left=True)
    columns = [name, CONTEXT, *_COLUMNS, *(_TIMED if fleet else ())]
    shown = _shown(columns, rows, one_model=len(models) == 1, one_context=len(contexts) == 1)
    told, repeated = _without_repeats(rows, [column.key for column in shown if column.key != "context"])
    legend = ["", *_legend(models, rows, dtypes, fleet), *_repeats_lines(repeated, policy)]
    table = Report(SCHEMA, payload, shown, told, before=before, legend=legend, after=after)
    return Report(SCHEMA, payload, columns, rows, sections=[table])


def _shown(
    columns: Sequence[Column], rows: Sequence[dict[str, Any]], *, one_model: bool, one_context: bool
) -> list[Column]:
    """Return the columns of a table: it says elsewhere what all its rows have, and has no room for all columns."""
    left_out = {key for key in _STATES if not any(row[key] for row in rows)}
    if one_model:
        left_out.add("name")
    if one_context:
        left_out.add("context")
    elif "fits" in rows[0]:
        left_out.add("bytes_per_token")
    if all(row.get("fits") for row in rows):
        left_out.add("fits")
    return sorted((column for column in columns if column.key not in left_out), key=lambda one: one.key != "context")


def _legend(models: Sequence[Served], rows: Sequence[dict[str, Any]], dtypes: Dtypes, fleet: Fleet | None) -> list[str]:
    """Return what times, bytes and policies mean, as far as the rows have them."""
    policy = models[0].servings[0].policy
    lines: list[str] = []
    if fleet is not None:
        times = f"Times are rooflines on {fleet.name} at the {fleet.rate} rate"
        lines += wrapped(f"{times}, with nothing for communication.")
        if not all(row["fits"] for row in rows):
            kept = "weights, state and checkpoints" if policy.checkpoint_every else "weights and state"
            lines += wrapped(f"fits: no where {kept} exceed the {format_bytes(fleet.memory)} there are.")
    lines += wrapped(_meaning(models, [key for key in _STATES if any(row[key] for row in rows)], dtypes))
    lines += [line for remark in policy_remarks(policy) for line in wrapped(remark)]
    if fleet is None:
        lines += wrapped("--gpu DEVICE adds times, and how many sequences fit.")
    return lines


def _repeats_lines(repeated: Mapping[int, Sequence[int]], policy: Policy) -> list[str]:
    """Return a sentence for each context that has the rows of longer ones, and the reason."""
    reason = "no state grows there" if policy.budget is None else "the budget bounds every cache that grows"
    lines: list[str] = []
    for context, others in repeated.items():
        longer = listed([f"{other:,}" for other in others], "and")
        lines += wrapped(f"The rows of {longer} tokens are those of {context:,}: {reason}.")
    return lines


def _without_repeats(
    rows: Sequence[dict[str, Any]], keys: Sequence[str]
) -> tuple[list[dict[str, Any]], dict[int, list[int]]]:
    """Return the rows without those of contexts that have the same ones as the context before, and these contexts.

    rows: in order of the contexts. keys: what is compared. The contexts left out stand under the one that has the rows.
    """
    told: list[dict[str, Any]] = []
    repeated: dict[int, list[int]] = {}
    first, last = 0, None
    for context, block in groupby(rows, itemgetter("context")):
        own = list(block)
        cells = [[row[key] for key in keys] for row in own]
        if cells == last:
            repeated.setdefault(first, []).append(context)
        else:
            told += own
            first, last = context, cells
    return told, repeated


def _meaning(models: Sequence[Served], states: Sequence[str], dtypes: Dtypes) -> str:
    """Return what the columns of bytes say. states: those of cache and recurrent state that the table has."""
    words = {"cache_bytes": "cache", "recurrent_bytes": "recurrent"}
    alike = all(weights_text(model.accounting.spec, dtypes) == dtypes.cache for model in models)
    formats = [f"weights {f'in {dtypes.cache}' if alike else 'as above'}"]
    if "cache_bytes" in states:
        formats = [f"{'weights and cache' if alike else 'weights as above, cache'} in {dtypes.cache}"]
    if "recurrent_bytes" in states:
        formats.append(f"recurrent state, read and written, in {dtypes.state}")
    if ":" in dtypes.cache and "cache_bytes" in states:
        formats[0] += f" ({format_figure(8 * dtypes.cache_bytes)} bits an element, with scales)"
    text = (
        f"{', '.join(['weights', *(words[key] for key in states)])}: bytes of one step, in which each sequence of the "
        f"batch gets a token at the end of the context; {', '.join(formats)}."
    )
    ffns = [use.layer.ffn for model in models for use in model.accounting.uses]
    entries = [
        "experts" * any(ffn.picks is not None and not ffn.is_table for ffn in ffns if ffn is not None),
        "rows of tables and memories" * any(ffn.is_table for ffn in ffns if ffn is not None),
    ]
    read = " and ".join(filter(None, entries))
    if read:
        text += f" {read[0].upper()}{read[1:]} read: those that the batch is expected to touch."
    if any(model.servings[0].host_bytes for model in models):
        text += " Rows on the host come over its link, for which no time counts."
    return text


def _context(serving: Serving, batches: Sequence[int]) -> dict[str, Any]:
    return {
        "context": serving.context,
        "cache_bytes": json_number(serving.cache_bytes),
        "cache_bytes_per_token": json_number(serving.cache_bytes_per_token),
        "recurrent_bytes": json_number(serving.recurrent_bytes),
        "state_bytes": json_number(serving.state_bytes),
        "largest_batch": serving.largest_batch,
        "least_devices": serving.least_devices,
        "prefill_flops": json_number(serving.prefill_flops),
        "prefill_s": json_float(serving.prefill_seconds),
        "steps": [_step(serving.step(batch)) for batch in batches],
        **serving_entry(serving),
    }


def _step(step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "batch": step.batch,
        "weight_bytes": json_number(step.weight_bytes),
        "fetched_bytes": json_number(step.fetched_bytes),
        "cache_bytes": json_number(step.cache_bytes),
        "recurrent_bytes": json_number(step.recurrent_bytes),
        "bytes_per_token": json_number(step.moved_bytes / step.batch),
        "flops_per_token": json_number(step.flops / step.batch),
        "memory_bytes": json_number(step.memory_bytes),
    }
    if step.seconds is not None:
        entry |= {
            "step_s": float(step.seconds),
            "tokens_per_s": json_float(step.tokens_per_s),
            "bound": "FLOPs" if step.compute_bound else "bytes",
            "fits": step.fits,
        }
    return entry


def _facts(model: Served) -> list[str]:
    """Return what is true of a model at any batch: its size, its state at each context, the prompt, who fits."""
    name, first = model.accounting.spec.name, model.servings[0]
    size, formats = parameters_text(model.accounting), weights_text(model.accounting.spec, first.dtypes)
    lines = wrapped(f"{name}: {size}; weights {format_bytes(first.stored_bytes)} in {formats}{_on_host(first)}")
    for serving in model.servings:
        state = " + ".join(_sizes(serving))
        prompt = f"prefill {format_quantity(serving.prefill_flops, 'FLOPs')}"
        facts = [f"{state or 'no state'} per sequence", prompt]
        if serving.fleet is not None:
            assert serving.prefill_seconds is not None
            facts = [_largest(serving, serving.fleet), *facts]
            facts[-1] += f", {format_duration(float(serving.prefill_seconds))}"
        text = f"at {serving.context:,} tokens: {'; '.join(facts)}"
        lines += [*wrapped(text, "  "), *policy_lines(serving, "    ")]
    return lines


def _on_host(serving: Serving) -> str:
    if not serving.host_bytes:
        return ""
    host, fetched = format_bytes(serving.host_bytes), format_bytes(serving.fetched_bytes(1))
    return f", {host} of them on the host, of which a token fetches {fetched}"


def _sizes(serving: Serving) -> list[str]:
    """Return what a sequence keeps: its cache, with what it would be without a budget, and its recurrent state."""
    cache, whole = serving.cache_bytes, serving.whole_cache_bytes
    sizes = [f"cache {format_bytes(cache)}"] if cache else []
    if whole != cache:
        sizes[0] += f" in place of {format_bytes(whole)}"
    return sizes + ([f"recurrent {format_bytes(serving.recurrent_bytes)}"] if serving.recurrent_bytes else [])


def _largest(serving: Serving, fleet: Fleet) -> str:
    least, most = serving.least_devices, serving.largest_batch
    if serving.device_bytes > fleet.memory:
        held = f"--devices {least} holds them{' and a sequence' if serving.sequence_bytes else ''}"
        return f"the weights do not fit in the {format_bytes(fleet.memory)} of {fleet.name} ({held})"
    if most is None:
        return "any batch fits"
    more = "" if most else f" (--devices {least} holds one)"
    return f"{fitting(most)} on {fleet.name}{more}"


def _against_twin(serving: Serving, twin: Serving, batches: Sequence[int]) -> dict[str, Any]:
    """Return by how many times the twin takes more: bytes of cache and state, FLOPs of a prompt, bytes of a token."""
    steps = [(serving.step(batch), twin.step(batch)) for batch in batches]
    return {
        "model": serving.accounting.spec.name,
        "twin": twin.accounting.spec.name,
        "context": serving.context,
        "cache_change": float(serving.cache_bytes / twin.cache_bytes - 1),
        "state_times": float(twin.state_bytes / serving.state_bytes),
        "prefill_times": float(twin.prefill_flops / serving.prefill_flops),
        "steps": [
            {
                "batch": mine.batch,
                "bytes_times": float(theirs.moved_bytes / mine.moved_bytes),
                "flops_times": float(theirs.flops / mine.flops),
                "time_times": None if mine.seconds is None else float((theirs.seconds or 0) / mine.seconds),
            }
            for mine, theirs in steps
        ],
    }


def _twin_lines(entry: dict[str, Any]) -> list[str]:
    key = "time_times" if entry["steps"][0]["time_times"] is not None else "bytes_times"
    word = "time" if key == "time_times" else "bytes moved"
    decode = ", ".join(f"{step[key]:.2f}x at batch {step['batch']:,}" for step in entry["steps"])
    return wrapped(
        f"{entry['model']} at {entry['context']:,} against {entry['twin']}: cache {entry['cache_change']:+.1%}; "
        f"the twin takes {entry['state_times']:.2f}x the state, {entry['prefill_times']:.2f}x the FLOPs of a prompt, "
        f"and per decoded token the {word} {decode}."
    )


_COLUMNS = [
    Column("batch", "batch", grouped),
    Column("weight_bytes", "weights", show_bytes),
    Column("cache_bytes", "cache", show_bytes),
    Column("recurrent_bytes", "recurrent", show_bytes),
    Column("bytes_per_token", "bytes\nper\ntoken", show_bytes),
]
_TIMED = [
    Column("step_s", "step\ntime", format_duration),
    Column("tokens_per_s", "tokens\nper s", lambda value: format_count(Fraction(value))),
    Column("fits", "fits", lambda value: "" if value else "no", left=True),
]
"""Columns with a device. Times of batches that do not fit in its memory are what they would be."""
