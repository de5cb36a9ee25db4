"""The result of `powerplan profile`, as it is printed, saved and read again (by planning: powerplan.measured)."""

from __future__ import annotations

import json
from dataclasses import dataclass

import msgspec

from powerplan.measured import Count, Positive, Result, SavedProfile, read_saved

PASSES = {"forward": "forward", "train": "forward+backward", "decode": "decode"}
"""Passes as `--pass` takes them, and as a saved profile names them."""


class Measurement(Result, frozen=True, kw_only=True):
    """One timing, and what it is compared with. Rates and counts are of one run, over all `batch` sequences.

    A run of "decode" is one more token of each sequence after `context` tokens; other runs process all of the context.
    flops: what the implementation executes: causal pairs only, and the backward pass as twice the forward pass.
    share_of_matmul: `tflops` over the rate of a matrix product in the same dtype.
    predicted_ms: roofline of the FLOPs that `recommend` counts, max(FLOPs / peak, bytes / bandwidth).
    peak_bytes: most bytes allocated at once beyond what was allocated before the run, outputs included.
    """

    gated: bool = False
    repeats: Count = 1
    flops: float = 0.0
    share_of_matmul: float | None = None
    predicted_ms: Positive | None = None
    peak_bytes: int | None = None


class Split(msgspec.Struct, frozen=True, kw_only=True, rename={"direction": "pass"}):
    """Time of one layer at a context: its weight part (projections, FFN), its state part, and the layer as a whole.
    WSFR: weight part over state part, in time and in FLOPs as `powerplan wsfr` counts them, without the LM head."""

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


class CrossoverTiming(msgspec.Struct, frozen=True):
    """Milliseconds of the two mixers of a crossover at one context."""

    context: Count
    ms: Positive
    against_ms: Positive


class Crossover(msgspec.Struct, frozen=True, kw_only=True, rename={"direction": "pass"}):
    """The context from which the mixer `name` takes less time than the mixer `against`.

    context: where a straight line between the logarithms of the time ratios at `slower_at` and `faster_at`, the nearest
    contexts measured on either side, crosses 1; None without both. estimate: where the line through the two longest
    contexts would cross 1, where `faster_at` is None.
    """

    name: str
    against: str
    direction: str
    context: Count | None = None
    slower_at: Count | None = None
    faster_at: Count | None = None
    estimate: Count | None = None
    tried: tuple[CrossoverTiming, ...] = ()


class CheckResult(msgspec.Struct, frozen=True):
    """One implementation compared with the reference: its largest error as a share of the error that is allowed."""

    name: str
    impl: str
    share_of_budget: float
    against: str


class Missing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, rename={"direction": "pass"}):
    """What was not measured, and the reason: something in words (what), or one run, with the seconds that it was
    expected to take where there was no time for it."""

    reason: str
    what: str | None = None
    part: str | None = None
    direction: str | None = None
    context: int | None = None
    name: str | None = None
    seconds: float | None = None

    def describe(self) -> str:
        what = self.what or f"{self.part}, {self.direction}, {self.context or 0:,} tokens: {self.name}"
        return f"{what}: {self.reason}"


@dataclass(frozen=True)
class OperationTime:
    """One kernel, stage or operator: how often it ran, and the seconds that it took in all."""

    name: str
    calls: int
    seconds: float


class Breakdown(msgspec.Struct, frozen=True, kw_only=True, rename={"direction": "pass"}):
    """Where the time of one run went, the longest operations first."""

    name: str
    impl: str
    direction: str
    context: Count
    parts: tuple[OperationTime, ...]


class LayerShape(msgspec.Struct, frozen=True, kw_only=True):
    """The layer that was built: its model, where the model has it, and its sizes."""

    model: str
    positions: str
    hidden_size: Count
    ffn: str | None = None
    rope: bool = False


class Profile(SavedProfile, frozen=True, kw_only=True):
    """A whole profile. matmul_flops_per_s and copy_bytes_per_s were measured in the same run. Times are predicted with
    peak_flops_per_s and bandwidth_bytes_per_s; peak_of says what these are."""

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
    checks: tuple[CheckResult, ...] = ()
    split: tuple[Split, ...] = ()
    crossover: tuple[Crossover, ...] = ()
    breakdown: tuple[Breakdown, ...] = ()
    missing: tuple[Missing, ...] = ()
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    def part(self, part: str, direction: str | None = None) -> list[Measurement]:
        """Return the measurements of one part of the layer, and of one pass where it is given, in measured order."""
        return [row for row in self.results if row.part == part and direction in (None, row.direction)]


def to_json(profile: Profile) -> bytes:
    """Return the file that `--save` writes: JSON of schema "powerplan.profile/1", in UTF-8."""
    return json.dumps(msgspec.to_builtins(profile), indent=1).encode() + b"\n"


def load_profile(path: str, where: str = "--show") -> Profile:
    """Return the profile in a file that `--save` wrote; `where` is the option that named the file.

    Raises:
        InputError: If the file does not exist, is no saved profile, or is one of another version.
    """
    return read_saved(path, Profile, where)
