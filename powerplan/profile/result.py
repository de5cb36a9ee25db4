"""The result of `powerplan profile`, as it is printed, saved and read again (by planning: powerplan.measured)."""

from __future__ import annotations

import json
import re
from typing import Annotated

import msgspec

from powerplan.measured import (
    Amount,
    Count,
    Direction,
    Measurement,
    Positive,
    SavedProfile,
    Text,
    document_at,
    saved_in,
)
from powerplan.profile.consistency import contradiction
from powerplan.typed import problem_at

PASSES: dict[str, Direction] = {"forward": "forward", "train": "forward+backward", "decode": "decode"}
"""Passes as `--pass` takes them, and as a saved profile names them."""


class Split(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"direction": "pass"}):
    """Time of one layer at a context: its weight part (projections, FFN), its state part, and the layer as a whole.
    WSFR: weight part over state part, in time and in FLOPs as `powerplan wsfr` counts them, without the LM head."""

    name: Text
    direction: Direction
    context: Count
    projections_ms: Positive
    ffn_ms: Positive | None = None
    state_ms: Positive
    wsfr_time: Positive
    wsfr_flops: Positive
    layer_ms: Positive | None = None

    @property
    def weight_ms(self) -> float:
        return self.projections_ms + (self.ffn_ms or 0.0)


class CrossoverTiming(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Milliseconds of the two mixers of a crossover at one context."""

    context: Count
    ms: Positive
    against_ms: Positive


class Crossover(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"direction": "pass"}):
    """The context from which the mixer `name` takes less time than the mixer `against`.

    context: where a straight line between the logarithms of the time ratios at `slower_at` and `faster_at`, the nearest
    contexts measured on either side, crosses 1; None without both. estimate: where the line through the two longest
    contexts would cross 1, where `faster_at` is None.
    """

    name: Text
    against: Text
    direction: Direction
    context: Count | None = None
    slower_at: Count | None = None
    faster_at: Count | None = None
    estimate: Count | None = None
    tried: tuple[CrossoverTiming, ...] = ()


class CheckResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One implementation compared with the reference: its largest error as a share of the error that is allowed."""

    name: Text
    impl: Text
    share_of_budget: Annotated[float, msgspec.Meta(ge=0, le=1)]
    against: Text


class Missing(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    rename={"direction": "pass"},
):
    """What was not measured, and the reason: something in words (what), or one run, with the seconds that it was
    expected to take where there was no time for it."""

    reason: Text
    what: Text | None = None
    part: Text | None = None
    direction: Direction | None = None
    context: Count | None = None
    name: Text | None = None
    seconds: Amount | None = None

    def describe(self) -> str:
        what = self.what or f"{self.part}, {self.direction}, {self.context or 0:,} tokens: {self.name}"
        return f"{what}: {self.reason}"


class OperationTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel, stage or operator: how often it ran, and the seconds that it took in all."""

    name: str
    calls: Count
    seconds: Amount


class Breakdown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"direction": "pass"}):
    """Where the time of one run went, the longest operations first."""

    name: Text
    impl: Text
    direction: Direction
    context: Count
    parts: tuple[OperationTime, ...]


class LayerShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The layer that was built: its model, where the model has it, and its sizes."""

    model: Text
    positions: Text
    hidden_size: Count
    ffn: Text | None = None
    rope: bool = False


class Profile(SavedProfile, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole profile. matmul_flops_per_s and copy_bytes_per_s were measured in the same run. Times are predicted with
    peak_flops_per_s and bandwidth_bytes_per_s; peak_of says what these are."""

    powerplan: Text
    python: Text
    threads: Count | None = None
    layer: LayerShape
    dtype: Text
    batch: Count
    seconds: Amount
    matmul_flops_per_s: Positive
    copy_bytes_per_s: Positive
    peak_flops_per_s: Positive
    bandwidth_bytes_per_s: Positive
    peak_of: Text
    checks: tuple[CheckResult, ...] = ()
    split: tuple[Split, ...] = ()
    crossover: tuple[Crossover, ...] = ()
    breakdown: tuple[Breakdown, ...] = ()
    missing: tuple[Missing, ...] = ()
    notes: tuple[Text, ...] = ()
    interrupted: bool = False

    def part(self, part: str, direction: str | None = None) -> list[Measurement]:
        """Return the measurements of one part of the layer, and of one pass where it is given, in measured order."""
        return [row for row in self.results if row.part == part and direction in (None, row.direction)]


def to_json(profile: Profile) -> bytes:
    """Return the file that `--save` writes: JSON of schema "powerplan.profile/1", in UTF-8."""
    return json.dumps(msgspec.to_builtins(profile), indent=1).encode() + b"\n"


def load_profile(path: str) -> Profile:
    """Return the profile in a file that `--save` wrote, as `--show` names it.

    Raises:
        InputError: If the file does not exist, is no saved profile, is one of another version, or contradicts itself.
    """
    document = document_at(path, "--show")
    profile = saved_in(document, Profile)
    if (found := contradiction(profile)) is not None:
        raise problem_at(document, *found)
    return _renamed(profile)


def _renamed(profile: Profile) -> Profile:
    """Return a profile with mixers named as they are now: files of earlier versions call attention "softmax"."""
    data = msgspec.to_builtins(profile)
    rows = (row for part in data.values() if isinstance(part, list | tuple) for row in part if isinstance(row, dict))
    for row in rows:
        row |= {key: _SOFTMAX.sub("attention", row[key]) for key in _NAMES if isinstance(row.get(key), str)}
    return msgspec.convert(data, Profile)


_SOFTMAX = re.compile(r"\bsoftmax\b")
_NAMES = ("name", "against", "what")
"""The fields of a profile's rows that hold the name of a mixer."""
