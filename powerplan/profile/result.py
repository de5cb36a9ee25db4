"""What `powerplan profile` found, as it is printed, saved and read again. Planning reads a part (measured.py)."""

from __future__ import annotations

import json

import msgspec

from powerplan.measured import Count, Positive, Result, SavedProfile, read_saved
from powerplan.profile.breakdown import Part

PASSES = {"forward": "forward", "train": "forward+backward", "decode": "decode"}
"""`--pass` on the command line: the name of the pass in a saved profile."""

PARTS = ("state", "projections", "ffn", "layer")
"""state: queries, keys, values in, output out. projections: hidden state to heads and back. layer: all, with norms."""


class Measurement(Result, frozen=True, kw_only=True):
    """One timing, with what it is compared with. Rates and counts are of one run, over all `batch` sequences.

    In decoding one run is one more token of each sequence after `context` tokens, else all tokens of the context.
    flops: as the planner counts what the implementation executes, causal pairs only, backward twice the forward.
    peak_bytes: most bytes allocated at once beyond what was there before the run, outputs included.
    predicted_ms: roofline of the FLOPs that `recommend` counts, max(FLOPs / peak, bytes / bandwidth).
    """

    gated: bool = False
    repeats: Count = 1
    flops: float = 0.0
    share_of_matmul: float | None = None
    predicted_ms: Positive | None = None
    peak_bytes: int | None = None

    @property
    def over_predicted(self) -> float | None:
        return None if self.predicted_ms is None else self.ms_p50 / self.predicted_ms


class Split(msgspec.Struct, frozen=True, kw_only=True, rename={"direction": "pass"}):
    """Time of one layer at a context: its weight part (projections, FFN) and its state part, in milliseconds.

    wsfr_time is their ratio, wsfr_flops that of their FLOPs as `powerplan wsfr` counts them (without the LM head).
    layer_ms: the layer run as a whole, with norms and residual sums, where that was measured.
    """

    name: str
    direction: str
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


class Tried(msgspec.Struct, frozen=True):
    """One place where a crossover was looked for: milliseconds of both at a context."""

    context: Count
    ms: Positive
    against_ms: Positive


class Crossover(msgspec.Struct, frozen=True, kw_only=True, rename={"direction": "pass"}):
    """The context from which `name` takes less time than `against`.

    Between slower_at and faster_at, the nearest contexts measured on either side; `context` is where a straight line
    between their logarithms crosses. One of them is None where that side was not met; `estimate` then says where the
    line through the nearest two places would cross.
    """

    name: str
    against: str
    direction: str
    context: Count | None = None
    slower_at: Count | None = None
    faster_at: Count | None = None
    estimate: Count | None = None
    tried: tuple[Tried, ...] = ()


class Checked(msgspec.Struct, frozen=True):
    """One implementation held against the reference: its largest error as a share of what is allowed."""

    name: str
    impl: str
    share_of_budget: float
    against: str


class Missing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"direction": "pass"}):
    """What was not measured, and why: one run (part, pass, context, name) or something else in words (what).

    seconds: what the run was expected to take, where there was no time for it.
    """

    reason: str
    what: str | None = None
    part: str | None = None
    direction: str | None = None
    context: int | None = None
    name: str | None = None
    seconds: float | None = None

    def describe(self) -> str:
        """Return what and why, in one line."""
        place = self.what or f"{self.part}, {self.direction}, {self.context or 0:,} tokens: {self.name}"
        return f"{place}: {self.reason}"


class Breakdown(msgspec.Struct, frozen=True, kw_only=True, rename={"direction": "pass"}):
    """Where one run's time went, the longest parts first."""

    name: str
    impl: str
    direction: str
    context: Count
    parts: tuple[Part, ...]


class LayerShape(msgspec.Struct, frozen=True, kw_only=True):
    """The layer that was built: of which model, where in it, and its sizes."""

    model: str
    positions: str
    hidden_size: Count
    ffn: str | None = None
    rope: bool = False


class Profile(SavedProfile, frozen=True, kw_only=True):
    """A whole profile. Rates in FLOP/s and bytes/s: measured in the same run; peak and bandwidth, predicted with."""

    results: list[Measurement]  # type: ignore[assignment]
    powerplan: str
    python: str
    threads: int | None = None
    layer: LayerShape
    dtype: str
    batch: Count
    seconds: float
    matmul_flops_per_s: Positive
    copy_bytes_per_s: Positive
    peak_flops_per_s: Positive
    bandwidth_bytes_per_s: Positive
    peak_of: str
    checks: tuple[Checked, ...] = ()
    split: tuple[Split, ...] = ()
    crossover: tuple[Crossover, ...] = ()
    breakdown: tuple[Breakdown, ...] = ()
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    def part(self, part: str, direction: str | None = None) -> list[Measurement]:
        """Return the rows of one part, of one pass where it is given, in the order of measuring."""
        return [row for row in self.results if row.part == part and direction in (None, row.direction)]


def to_json(profile: Profile) -> bytes:
    """Return a profile as the file that `--save` writes."""
    return json.dumps(msgspec.to_builtins(profile), indent=1).encode() + b"\n"


def read_whole(path: str, where: str = "--show") -> Profile:
    """Read what `--save` wrote, to print it again. Raises InputError for a file that is none, or of another version."""
    return read_saved(path, Profile, where)
