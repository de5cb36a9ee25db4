"""`powerplan recommend`: the winner and why, then the candidates, then why each stands where it does."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from powerplan.accounting import positions_text
from powerplan.mixers import Mixer
from powerplan.report.parts import convention_entry, model_entry, row_entry, show_bytes, show_ratio, wrapped
from powerplan.report.reasons import LEGEND, gain, why
from powerplan.report.render import Column, Report, grouped
from powerplan.search import Candidate, Recommendation, Solution
from powerplan.swap import swap_text
from powerplan.swap.shapes import replacement_heads
from powerplan.units import format_bytes, format_count, format_duration, format_parameters, format_ratio

SCHEMA = "powerplan.recommend/1"
SOLVE_SCHEMA = "powerplan.solve/1"
MOST_CONTEXTS = 3
"""Contexts in the table, the longest ones; JSON has all."""


def recommend_report(answer: Recommendation) -> Report:
    """Return the report of a recommendation."""
    request, winner = answer.request, answer.recommended
    reasons = [why(answer, place) for place in range(len(answer.candidates))]
    saved = gain(answer)
    candidates = [
        _candidate(item, place, reason)
        for place, (item, reason) in enumerate(zip(answer.candidates, reasons, strict=True), 1)
    ]
    payload = {
        "model": model_entry(answer.base),
        "convention": convention_entry(answer.base, request.dtype),
        "context": answer.contexts[-1],
        "contexts": list(answer.contexts),
        "target": float(request.target),
        "keep": request.keep,
        "searched": answer.searched,
        "recommended": candidates[0]
        | {"chunk_sizes": [{"mixer": c.mixer, "chunk_size": c.size, "source": c.source} for c in answer.chunks]},
        "candidates": candidates,
        "balanced_context": answer.balanced_context,
        "balanced_window": answer.balanced_window.tokens if answer.balanced_window else None,
        "balanced_window_layers": _window_layers(answer),
        "gain": saved,
    }
    change = f", {saved}" if saved and not winner.plan.unchanged else ""
    rest = f"; {saved}" if saved and winner.plan.unchanged else ""
    sentence = f"{winner.label}, {_ratio(winner)}{change}: {reasons[0]}{rest}"
    before = [*_question(answer), *wrapped(sentence, "recommended: ")]
    before += [f"layers: {text}" for text in _layers(winner)]
    before += _chunk_lines(answer)
    before += wrapped(_balance(answer))
    columns = [_PLACE, _LABEL, *_ratios(answer), *_columns(answer)]
    rows = [entry | _at_contexts(item) for entry, item in zip(candidates, answer.candidates, strict=True)]
    after = []
    for place, reason in enumerate(reasons[1:], 2):
        after += wrapped(reason, f"{place:>2}  ")
    after += [
        *([""] if after else []),
        *wrapped(f"{answer.searched:,} candidate{'' if answer.searched == 1 else 's'}. {LEGEND}"),
    ]
    shape = replacement_heads(answer.base.spec)
    if shape is not None:
        after += wrapped(f"Other mixers have {shape.describe()} in place of MLA's, so that the weights stay.")
    after += _remarks(answer)
    return Report(SCHEMA, payload, columns, rows, before=before, after=after)


def _at_contexts(item: Candidate) -> dict[str, Any]:
    return {f"wsfr_{row.context}": float(row.wsfr) if row.wsfr is not None else None for row in item.rows}


def _question(answer: Recommendation) -> list[str]:
    contexts = ", ".join(f"{context:,}" for context in answer.contexts)
    request = answer.request
    row = answer.base.row(answer.contexts[-1], request.dtype)
    now = "no state" if row.wsfr is None else format_ratio(row.wsfr)
    kept = "" if request.keep == "weights" else ", resized to the FLOPs per token it has"
    target = format_ratio(request.target)
    return wrapped(f"{answer.base.spec.name} at {contexts} tokens: {now} as it is, target {target}{kept}")


def _chunk_lines(answer: Recommendation) -> list[str]:
    """Return the chunk sizes of the winner by where they come from; one size where all its mixers take the same."""
    parts = []
    for source in dict.fromkeys(chunk.source for chunk in answer.chunks):
        chunks = [chunk for chunk in answer.chunks if chunk.source == source]
        if len({chunk.size for chunk in chunks}) == 1:
            parts.append(f"{chunks[0].size:,} ({source})")
        else:
            sizes = ", ".join(f"{chunk.size:,} for {chunk.mixer}" for chunk in chunks)
            parts.append(f"{sizes} ({source})")
    return wrapped("; ".join(parts), "chunk size: ") if parts else []


def _ratio(item: Candidate) -> str:
    return "no state" if item.row.wsfr is None else format_ratio(item.row.wsfr)


def _balance(answer: Recommendation) -> str:
    context, target = answer.contexts[-1], answer.request.target
    word = "balanced" if target == 1 else f"at {format_ratio(target)}"
    place = f"at {answer.balanced_context:,} tokens" if answer.balanced_context else "at no context"
    found = answer.balanced_window
    if not answer.movable:
        return f"{word} as it is: {place}; none of its layers can take a window"
    if found is None:
        return f"{word} as it is: {place}; at {context:,} with no window"
    layers = "in the layers whose state grows" if found.partial else "in every layer"
    return f"{word} as it is: {place}; at {context:,} with a window of {found.tokens:,} {layers}"


def _window_layers(answer: Recommendation) -> str | None:
    if answer.balanced_window is None:
        return None
    return "growing" if answer.balanced_window.partial else "all"


def _layers(item: Candidate) -> list[str]:
    """Return which layers of a mix have which mixer; nothing where all have the same."""
    if not item.plan.is_mix and not item.plan.scope.partial:
        return []
    uses: dict[str, list[range]] = {}
    for use in item.spec.layer_uses():
        if use.layer.mixer is not None:
            uses.setdefault(_mixer_text(use.layer.mixer), []).extend(use.positions)
    return [f"{name} in {positions_text(tuple(spans))}" for name, spans in uses.items()]


def _mixer_text(mixer: Mixer) -> str:
    heads = mixer.own_heads()
    return mixer.describe() if heads is None else f"{mixer.describe()}, {heads.describe()}"


def _remarks(answer: Recommendation) -> list[str]:
    request = answer.request
    lines = []
    partial = [item.plan.scope for item in answer.candidates if item.plan.scope.partial]
    if partial:
        word = "growing: only" if any(scope.marked for scope in partial) else "Candidates change only"
        lines.append(f"{word} the layers whose state grows with the context; the others stay.")
    if request.keep == "weights" and answer.movable:
        lines.append("Candidates with smaller weights, or dearer than attention over every key, are ranked last.")
    elif request.keep == "flops":
        lines.append("Width and depth change together; FLOPs per token are within 2 % where heads and layers allow it.")
    times = [item.times for item in answer.candidates if item.times is not None]
    if times:
        lines.append("train, decode: time per token on one device, a roofline: max(FLOPs / peak, bytes / bandwidth).")
        lines.append("No kernel reaches a roofline. Decoding is at batch 1, at the end of the context.")
        if request.profile and any(time.measured for time in times):
            lines.append(f"measured: the mixers' part of training, in {request.profile.label}.")
        lacking = sorted({time.missing.brief() for time in times if time.missing})
        if request.profile and lacking:
            lines += wrapped(f"Not in {request.profile.path}, so a roofline: {'; '.join(lacking)}.")
    return lines


def _candidate(item: Candidate, place: int, reason: str) -> dict[str, Any]:
    row = row_entry(item.row)
    entry: dict[str, Any] = {
        "rank": place,
        "mixer": item.mixer,
        "label": item.label,
        "wsfr": row["wsfr"],
        "weight_flops_per_token": row["weight_flops_per_token"],
        "state_flops_per_token": row["state_flops_per_token"],
        "flops_per_token": row["weight_flops_per_token"] + row["state_flops_per_token"],
        "state_elements": row["state_elements"],
        "state_bytes": row["state_bytes"],
        "decode_weight_bytes_per_token": row["decode_weight_bytes_per_token"],
        "decode_state_bytes_per_token": row["decode_state_bytes_per_token"],
        "params_total": item.parameters,
        "layers": item.spec.layer_count,
        "hidden_size": item.spec.hidden_size,
        "feasible": item.feasible,
        "why": reason,
        "rows": [row_entry(one) for one in item.rows],
    }
    if item.tokens is not None:
        entry["tokens"] = item.tokens
    if item.times is not None:
        entry |= {
            "train_s_per_token": item.times.train,
            "decode_s_per_token": item.times.decode,
            "time_source": "measured" if item.times.measured else "roofline",
        }
    return entry


_PLACE = Column("rank", "#")
_LABEL = Column("label", "candidate", left=True)


def _ratios(answer: Recommendation) -> list[Column]:
    """Return a column of ratios; one for each context where there are several."""
    if len(answer.contexts) == 1:
        return [Column("wsfr", "WSFR", show_ratio)]

    shown = answer.contexts[-MOST_CONTEXTS:]
    return [Column(f"wsfr_{context}", f"WSFR at\n{context:,}", show_ratio) for context in shown]


def _columns(answer: Recommendation) -> list[Column]:
    columns = []
    if answer.request.keep == "flops":
        columns.append(Column("params_total", "params", format_parameters))
        columns.append(Column("layers", "depth", grouped))
        columns.append(Column("hidden_size", "width", grouped))
    timed = any(item.times is not None for item in answer.candidates)
    columns_left = not timed or answer.request.limits.flops is None
    if answer.request.keep == "weights" and len(answer.contexts) == 1 and columns_left:
        columns.append(Column("flops_per_token", "FLOPs\nper token", lambda value: format_count(Fraction(value))))
    columns.append(Column("state_bytes", "state per\nsequence", show_bytes))
    if answer.request.limits.flops is not None:
        columns.append(Column("tokens", "tokens", format_parameters))
    if timed:
        columns.append(Column("train_s_per_token", "train\nper token", format_duration))
        columns.append(Column("decode_s_per_token", "decode\nper token", format_duration))
    if timed and answer.request.profile is not None:
        columns.append(Column("time_source", "train:", left=True))
    if not all(item.feasible for item in answer.candidates):
        columns.append(Column("feasible", "", lambda value: "" if value else "no", left=True))
    return columns


def solve_report(solution: Solution, name: str, context: int, target: Fraction) -> Report:
    """Return the report of a reverse question."""
    words = {"context": "context", "window": "window in every layer", "p": "degree p"}[solution.unknown]
    at, beyond = solution.at, solution.beyond
    assert at.wsfr is not None
    assert beyond.wsfr is not None
    unit = "" if solution.unknown == "p" else " tokens"
    place = "" if solution.unknown == "context" else f" at {context:,} tokens"
    line = (
        f"{name}{place}: the largest {words} with {format_ratio(target)} or more weight is {solution.value:,}{unit}: "
        f"{format_ratio(at.wsfr)}, state {format_bytes(at.state_bytes)} per sequence"
    )
    rows = [{"value": value, **row_entry(row)} for value, row in ((solution.value, at), (solution.value + 1, beyond))]
    payload = {
        "model": name,
        "solve": solution.unknown,
        "target": float(target),
        "context": at.context,
        "value": solution.value,
        "mixer": swap_text(solution.swap) if solution.swap else None,
        "at": row_entry(at),
        "beyond": row_entry(beyond),
    }
    columns = [
        Column("value", solution.unknown, lambda value: f"{value:,}"),
        Column("wsfr", "WSFR", show_ratio),
        Column("weight_flops_per_token", "weight\nFLOPs", lambda value: format_count(Fraction(value))),
        Column("state_flops_per_token", "state\nFLOPs", lambda value: format_count(Fraction(value))),
        Column("state_bytes", "state per\nsequence", show_bytes),
    ]
    return Report(SOLVE_SCHEMA, payload, columns, rows, before=wrapped(line))
