"""Whether the parts of a saved profile agree: what refers to a timing must find it, and its numbers must be those."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import isclose
from typing import TYPE_CHECKING

from powerplan.documents import Step
from powerplan.errors import shown
from powerplan.measured import Measurement

if TYPE_CHECKING:
    from powerplan.profile.result import Crossover, Missing, Profile, Split

Found = tuple[tuple[Step, ...], str]
"""The path of a value, and what is wrong with it."""

Timings = dict[tuple[str, str, str, int], Measurement]
"""Timings by part, name of the mixer, pass and context."""


def contradiction(profile: Profile) -> Found | None:
    """Return the first place where a profile contradicts itself, and how; None where it does not."""
    return next(_contradictions(profile), None)


def _contradictions(profile: Profile) -> Iterator[Found]:
    timings: Timings = {}
    for index, row in enumerate(profile.results):
        path: tuple[Step, ...] = ("results", index)
        key = (row.part, row.name, row.direction, row.context)
        if key in timings:
            what = f"{row.part}, {row.direction}, {row.context:,} tokens, {shown(row.name)}"
            yield path, f"is the second timing of {what}"
        timings[key] = row
        if row.dtype != profile.dtype:
            yield (*path, "dtype"), f"{row.dtype} is not that of the profile, {profile.dtype}"
        if row.batch != profile.batch:
            yield (*path, "batch"), f"{row.batch} is not that of the profile, {profile.batch}"
    for index, split in enumerate(profile.split):
        yield from _of_split(split, timings, ("split", index))
    for index, crossover in enumerate(profile.crossover):
        yield from _of_crossover(crossover, timings, ("crossover", index))
    for index, run in enumerate(profile.breakdown):
        if ("state", run.name, run.direction, run.context) not in timings:
            yield ("breakdown", index), _untimed(run.name, run.direction, run.context)
    for index, missing in enumerate(profile.missing):
        yield from _of_missing(missing, ("missing", index))


def _untimed(name: str, direction: str, context: int) -> str:
    return f"the results have no {direction} time of {shown(name)} alone at {context:,} tokens"


def _of_split(split: Split, timings: Timings, path: tuple[Step, ...]) -> Iterator[Found]:
    place = (split.name, split.direction, split.context)
    state, layer = timings.get(("state", *place)), timings.get(("layer", *place))
    if state is None:
        yield path, _untimed(*place)
    elif split.state_ms != state.ms_p50:
        yield (*path, "state_ms"), f"{split.state_ms} is not the time in the results, {state.ms_p50}"
    if split.layer_ms != (None if layer is None else layer.ms_p50):
        yield (*path, "layer_ms"), f"{shown(split.layer_ms)} is not the time of the layer in the results"
    if not isclose(split.wsfr_time, split.weight_ms / split.state_ms, rel_tol=1e-6):
        ratio = split.weight_ms / split.state_ms
        yield (*path, "wsfr_time"), f"{split.wsfr_time} is not the ratio of the times, {ratio:.6g}"


def _of_crossover(crossover: Crossover, timings: Timings, path: tuple[Step, ...]) -> Iterator[Found]:
    direction = crossover.direction
    for key, name in (("name", crossover.name), ("against", crossover.against)):
        if not any(timing[:3] == ("state", name, direction) for timing in timings):
            yield (*path, key), f"the results have no {direction} time of {shown(name)} alone"
    tried = [times.context for times in crossover.tried]
    if not tried:
        yield (*path, "tried"), "is empty; at least one context is needed"
    for index, (shorter, longer) in enumerate(pairwise(tried), 1):
        if longer <= shorter:
            yield (*path, "tried", index), f"context {longer:,} does not follow {shorter:,}; contexts rise"
    slower = [times.context for times in crossover.tried if times.ms > times.against_ms]
    slower_at = max(slower, default=None)
    faster_at = min((context for context in tried if context > (slower_at or 0)), default=None)
    for key, found in (("slower_at", slower_at), ("faster_at", faster_at)):
        if (own := getattr(crossover, key)) != found:
            yield (*path, key), f"{shown(own)} is not what the times tried say, {shown(found)}"
    if slower_at and faster_at:
        if crossover.context is None or not slower_at <= crossover.context <= faster_at:
            yield (*path, "context"), f"{shown(crossover.context)} is not between {slower_at:,} and {faster_at:,}"
    elif crossover.context is not None:
        yield (*path, "context"), f"{crossover.context:,} has no measured context on both sides"
    if (crossover.estimate is None) != (faster_at is not None):
        yield (*path, "estimate"), "stands where no context was faster, and only there"


def _of_missing(missing: Missing, path: tuple[Step, ...]) -> Iterator[Found]:
    run = {"part": missing.part, "pass": missing.direction, "context": missing.context, "name": missing.name}
    given = [key for key, value in run.items() if value is not None]
    if missing.what is None:
        for key in run:
            if key not in given:
                yield path, f"needs {key}, or says in words what is missing"
    elif given or missing.seconds is not None:
        yield path, f"says what is missing in words, and by {', '.join(given) or 'seconds'}"
