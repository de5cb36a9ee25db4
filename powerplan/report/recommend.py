"""`powerplan recommend`: the first candidate and what it means, all of them, and why each stands where it does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from powerplan.errors import listed
from powerplan.report.advice import HYPOTHESIS, advice, advice_entry
from powerplan.report.citing import findings
from powerplan.report.colour import Role, side_of
from powerplan.report.parts import convention_entry, model_entry, row_entry, show_bytes, show_flops, show_ratio
from powerplan.report.reasons import gain, why
from powerplan.report.render import Report
from powerplan.report.runs import candidate_entry, run_columns, run_entry, run_lines, run_notes, run_remarks
from powerplan.report.tables import Column, grouped
from powerplan.report.target import shortfall, target_entry, verdict
from powerplan.report.width import wrapped
from powerplan.search import Recommendation
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.value import AS_IS
from powerplan.units import format_duration, format_parameters, format_ratio

SCHEMA = "powerplan.recommend/1"
POWER = "power p: attention whose weights are (q·k)^p, computed from a state of fixed size."
MOST_CONTEXTS = 3
"""Contexts in the table, the longest ones; JSON has all."""


def recommend_report(answer: Recommendation, command: Sequence[str], written: str | None = None) -> Report:
    """Return the report of a recommendation.

    command: the words of a command line that asks for it. written: the file that has its model already, if any.
    """
    request, winner = answer.request, answer.recommended
    entries = [_candidate(answer, place) for place in range(len(answer.candidates))]
    saved, window, advised = gain(answer), answer.balanced_window, advice(answer, command, written)
    chunks = [{"mixer": chunk.mixer, "chunk_size": chunk.size, "source": chunk.source} for chunk in answer.chunks]
    payload = {
        "model": model_entry(answer.base),
        "convention": convention_entry(answer.base, request.dtypes),
        "context": answer.contexts[-1],
        "contexts": list(answer.contexts),
        "target": float(request.target),
        **target_entry(answer),
        "keep": request.keep,
        "searched": answer.searched,
        "recommended": entries[0] | {"chunk_sizes": chunks},
        "candidates": entries,
        "balanced_context": answer.balanced_context,
        "balanced_window": window.tokens if window else None,
        "balanced_window_layers": None if window is None else "growing" if window.partial else "all",
        "gain": saved,
        **advice_entry(advised),
        "findings": findings(answer),
        **run_entry(answer),
    }
    title = [
        *_question(answer),
        *wrapped(f"{winner.label}, {show_ratio(winner.row.wsfr)}, {verdict(answer)}", "recommended: "),
    ]
    before = [*wrapped(shortfall(answer), "target: "), *run_lines(answer)]
    after = [line for entry in entries for line in wrapped(entry["why"], f"{entry['rank']:>2}  ")]
    after += ["", *(line for text in (HYPOTHESIS, *findings(answer)) for line in wrapped(text))]
    after += [*run_notes(answer), *_lacking(answer)]
    return Report(
        SCHEMA,
        payload,
        _columns(answer),
        [entry | {f"wsfr_{row['context']}": row["wsfr"] for row in entry["rows"]} for entry in entries],
        title=title,
        before=before,
        block=advised,
        legend=[*_chunk_lines(answer), *wrapped(_balance(answer)), "", *_legend(answer)],
        after=after,
        strong=lambda row: row["rank"] == 1,
    )


def _question(answer: Recommendation) -> list[str]:
    contexts = listed([f"{context:,}" for context in answer.contexts], "and")
    now = listed([show_ratio(answer.base.wsfr(context)) for context in answer.contexts], "and")
    kept = "" if answer.request.keep == "weights" else ", resized to the FLOPs per token it has"
    target = format_ratio(answer.request.target)
    return wrapped(f"{answer.base.spec.name} at {contexts} tokens: {now} as it is, target {target}{kept}")


def _chunk_lines(answer: Recommendation) -> list[str]:
    """Return the chunk sizes of the winner that have to be set, by where they come from; one where all are the same."""
    parts = []
    own = [chunk for chunk in answer.chunks if not chunk.default]
    for source in dict.fromkeys(chunk.source for chunk in own):
        chunks = [chunk for chunk in own if chunk.source == source]
        same = len({chunk.size for chunk in chunks}) == 1
        sizes = [f"{chunk.size:,}" if same else f"{chunk.size:,} for {chunk.mixer}" for chunk in chunks]
        parts.append(f"{', '.join(dict.fromkeys(sizes))} ({source})")
    return wrapped("; ".join(parts), "chunk size: ") if parts else []


def _balance(answer: Recommendation) -> str:
    target, window = answer.request.target, answer.balanced_window
    word = "balanced" if target == 1 else f"on target ({format_ratio(target)})"
    none = "at no context" if answer.base.longest_is_found else "not computed"
    place = f"at {answer.balanced_context:,} tokens" if answer.balanced_context else none
    other = f"at {answer.contexts[-1]:,} with no window"
    if not answer.movable:
        other = "none of its layers can take a window"
    elif window is not None:
        layers = "in the layers whose state grows" if window.partial else "in every layer"
        other = f"at {answer.contexts[-1]:,} with a window of {window.tokens:,} {layers}"
    return f"{word} as it is: {place}; {other}"


def _legend(answer: Recommendation) -> list[str]:
    """Return what the table shows, and what its names and columns mean."""
    request, count, shown = answer.request, answer.searched, len(answer.candidates)
    searched = f"{count:,} candidates, the best of their sorts first" if count > 1 else "1 candidate"
    lines = wrapped(f"{searched} ({shown} shown, --top)." if count > shown else f"{searched}.")
    lines += [line for text in (*_names(answer), _looks_back(answer)) for line in wrapped(text)]
    if shape := replacement_heads(answer.base.spec):
        lines += wrapped(f"Other mixers have {shape.describe()} in place of MLA's, so that the weights stay.")
    partial = [candidate.plan.scope for candidate in answer.candidates if candidate.plan.scope.partial]
    if partial:
        word = "growing: only" if any(scope.marked for scope in partial) else "Candidates change only"
        lines += wrapped(f"{word} the layers whose state grows with the context; the others stay.")
    if len(answer.contexts) > 1:
        lines += wrapped(
            "Each context is judged by itself, and the one furthest from the target decides. Where attention is "
            "lighter than the target at a shorter context, its FLOPs are the aim there."
        )
    if request.keep == "weights" and answer.movable and shown > 1:
        lines += wrapped("Candidates with smaller weights, or dearer than attention over every key, are ranked last.")
    elif request.keep == "flops":
        lines += wrapped(
            "Width and depth change together; FLOPs per token are within 2% where heads and layers allow it."
        )
    lines += run_remarks(answer)
    if any(candidate.times for candidate in answer.candidates):
        keys = [column.key for column in _columns(answer) if not column.raw]
        timed = ", ".join(word for word in ("train", "decode") if f"{word}_s_per_token" in keys)
        if timed:
            lines += wrapped(
                f"{timed}: time per token on one device, a roofline: max(FLOPs / peak, bytes / bandwidth)."
            )
            lines += wrapped("No kernel reaches a roofline. Decoding is at batch 1, at the end of the context.")
        if request.profile and any(own.times.measured for own in answer.candidates if own.times is not None):
            lines += wrapped(f"measured: the mixers' part of training, in {request.profile.label}.")
    return lines


def _names(answer: Recommendation) -> list[str]:
    """Return what "power", "6x128" and "/8" mean, where a name has them."""
    names = " ".join(candidate.label for candidate in answer.candidates)
    shapes = [f"{heads}x{dim}: {heads} heads of {dim}" for heads, dim in re.findall(r"\b(\d+)x(\d+)\b", names)[:1]]
    shared = [
        f"/{count}: {count} key/value head{'' if count == '1' else 's'}" for count in re.findall(r"/(\d+)\b", names)[:1]
    ]
    words = [*(f"{shape}, else the model's own" for shape in shapes), *shared]
    power = [POWER] if "power" in names else []
    return [*power, *([f"{'; '.join(words)}."] if words else [])]


def _lacking(answer: Recommendation) -> list[str]:
    """Return what a saved profile has no times of."""
    profile = answer.request.profile
    missing = {own.times.missing.brief() for own in answer.candidates if own.times is not None and own.times.missing}
    return (
        wrapped(f"Not in {profile.path}, so a roofline: {'; '.join(sorted(missing))}.") if profile and missing else []
    )


def _looks_back(answer: Recommendation) -> str:
    """Return what the column of this name says, as far as the candidates need it."""
    reaches = {candidate.direct_reach_tokens for candidate in answer.candidates}
    words = ["looks back: how many tokens a layer meets directly"]
    if reaches - {None, answer.contexts[-1]}:
        words.append("stacked windows pass on more")
    if None in reaches:
        words.append("state: none, only its state")
    return "; ".join(words) + "."


def _candidate(answer: Recommendation, place: int) -> dict[str, Any]:
    """Return what JSON says of the candidate at `place` (from 0)."""
    candidate = answer.candidates[place]
    row = row_entry(candidate.row)
    row["flops_per_token"] = row["weight_flops_per_token"] + row["state_flops_per_token"]
    entry: dict[str, Any] = {
        "rank": place + 1,
        "mixer": candidate.mixer,
        "label": candidate.label,
        **{key: row[key] for key in _AT_THE_LONGEST_CONTEXT},
        "params_total": candidate.parameters,
        "layers": candidate.spec.layer_count,
        "hidden_size": candidate.spec.hidden_size,
        "direct_reach_tokens": candidate.direct_reach_tokens,
        "target_met": candidate.balanced,
        "feasible": candidate.feasible,
        "why": why(answer, place),
        "rows": list(map(row_entry, candidate.rows)),
    }
    if candidate.tokens is not None:
        entry["tokens"] = candidate.tokens
    if candidate.run is not None:
        entry |= candidate_entry(candidate.run)
    if candidate.times is not None:
        entry |= {
            "train_s_per_token": candidate.times.train,
            "decode_s_per_token": candidate.times.decode,
            "time_source": "measured" if candidate.times.measured else "roofline",
        }
    return entry


_AT_THE_LONGEST_CONTEXT = (
    *("wsfr", "weight_flops_per_token", "state_flops_per_token", "flops_per_token", "state_elements", "state_bytes"),
    *("decode_weight_bytes_per_token", "decode_state_bytes_per_token"),
)


def _columns(answer: Recommendation) -> list[Column]:
    """Return the columns of the table, with one of ratios for each of several contexts."""
    request, shown = answer.request, answer.contexts[-MOST_CONTEXTS:]
    priced = answer.runs is not None and request.limits.price is not None
    side = partial(side_of, target=request.target)
    ratios = [Column(f"wsfr_{context}", f"WSFR at\n{context:,}", show_ratio, role=side) for context in shown]
    if priced and len(shown) == MOST_CONTEXTS:
        ratios[0] = replace(ratios[0], raw=True)
    single = len(answer.contexts) == 1
    columns = [Column("rank", "#"), Column("label", "candidate", left=True, fold=" + ", role=_as_it_is)]
    columns += [Column("wsfr", "WSFR", show_ratio, role=side)] if single else ratios
    if request.keep == "flops":
        columns.append(Column("params_total", "params", format_parameters))
        columns.append(Column("layers", "depth", grouped))
        columns.append(Column("hidden_size", "width", grouped, raw=priced))
    timed = any(candidate.times for candidate in answer.candidates)
    if request.keep == "weights" and single and not (timed and request.limits.flops):
        columns.append(Column("flops_per_token", "FLOPs\nper token", show_flops, raw=answer.runs is not None))
    columns.append(Column("state_bytes", "state per\nsequence", show_bytes))
    columns.append(Column("direct_reach_tokens", "looks\nback", partial(_show_reach, answer.contexts[-1])))
    if request.limits.flops is not None:
        columns.append(Column("tokens", "tokens", format_parameters))
    if timed:
        each = "per token" if request.limits.devices == 1 else "1 device"
        planned = answer.runs is not None and request.profile is None
        columns.append(Column("train_s_per_token", f"train\n{each}", format_duration, raw=planned))
        wide = planned and (request.keep == "flops" or priced)
        columns.append(Column("decode_s_per_token", f"decode\n{each}", format_duration, raw=wide))
    columns += run_columns(answer)
    if timed and request.profile is not None:
        columns.append(Column("time_source", "train:", left=True))
    if not all(candidate.feasible for candidate in answer.candidates):
        columns.append(Column("feasible", "allowed", lambda value: "" if value else "no", left=True))
    return columns


def _as_it_is(label: str) -> Role | None:
    return "strong" if label == AS_IS else None


def _show_reach(context: int, tokens: int | None) -> str:
    return "state" if tokens is None else "all" if tokens == context else grouped(tokens)
