"""Times that `powerplan profile --save` wrote, read back: how long a mixer takes per token on that machine."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec

from powerplan.choices import Dtype
from powerplan.documents import Document, parse_json
from powerplan.errors import InputError, shown
from powerplan.hardware import Peak, find_device, peak_of
from powerplan.mixers import Mixer
from powerplan.spec import ModelSpec
from powerplan.textfiles import read_text
from powerplan.typed import check_scalars, converted

SCHEMA = "powerplan.profile/1"

MAX_FILE_BYTES = 4 * 2**20
"""The largest saved profile that is read: a row has 700 bytes, and some thousands of rows take hours to measure."""

Positive = Annotated[float, msgspec.Meta(ge=1e-15, le=1e30)]
"""A time in milliseconds, a rate or a ratio: beyond any machine on both sides, and all arithmetic on it is finite."""

Amount = Annotated[float, msgspec.Meta(ge=0, le=1e30)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**50)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Direction = Literal["forward", "forward+backward", "decode"]
LayerPart = Literal["state", "projections", "ffn", "layer"]

FORWARD: Direction = "forward"
TRAINING: Direction = "forward+backward"

RECURRENT = ("gla", "deltanet", "gated_deltanet", "kda", "mamba1", "mamba2", "log_linear", "rwkv7", "gsa")
"""Recurrent kinds that `profile --against` times: those whose recurrence powerplan.models has."""

_MIXER = re.compile(
    f"attention|linear|{'|'.join(RECURRENT)}|"
    r"window:(?P<window>[1-9][0-9]{0,15})|power(:p=(?P<p>[1-9][0-9]?))?"
)


class Measurement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename={"direction": "pass"}):
    """One timing: median and spread of one pass over `batch` sequences of `context` tokens, in milliseconds.

    mixer: "attention", "window:4096", "linear", "power:p=2", "power" with `p`, or a recurrent kind, such as "kda".
    part: "state" is the mixer alone, queries, keys and values in, output out; what projections take is counted with the
    weights.

    A run of "decode" is one more token of each sequence after `context` tokens; other runs process all of the context.
    flops: what the implementation executes: causal pairs only, and the backward pass as twice the forward pass.
    share_of_matmul: `tflops` over the rate of a matrix product in the same dtype.
    predicted_ms: roofline of the FLOPs that `recommend` counts, max(FLOPs / peak, bytes / bandwidth).
    peak_bytes: most bytes allocated at once beyond what was allocated before the run, outputs included.
    Raises ValueError("field: problem") where fields contradict each other.
    """

    name: Text
    impl: Text
    direction: Direction
    context: Count
    ms_p50: Positive
    mixer: str
    heads: Count
    kv_heads: Count
    head_dim: Count
    p: Count | None = None
    window: Count | None = None
    chunk_size: Count | None = None
    batch: Count = 1
    dtype: Dtype = "bf16"
    part: LayerPart = "state"
    ms_p20: Positive | None = None
    ms_p80: Positive | None = None
    tokens_per_s: Positive | None = None
    tflops: Amount | None = None
    gated: bool = False
    repeats: Count = 1
    flops: Amount = 0.0
    share_of_matmul: Amount | None = None
    predicted_ms: Positive | None = None
    peak_bytes: Annotated[int, msgspec.Meta(ge=0)] | None = None

    def __post_init__(self) -> None:
        match = _MIXER.fullmatch(self.mixer)
        if match is None:
            allowed = "allowed are attention, window:4096, linear, power, power:p=2 and recurrent kinds such as kda"
            raise ValueError(f"mixer: {shown(self.mixer)} is not a mixer that is timed; {allowed}")
        for field, text in match.groupdict().items():
            own = getattr(self, field)
            if text is not None and own is not None and own != int(text):
                raise ValueError(f"{field}: {own} contradicts the mixer, {self.mixer}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads {self.heads}")
        if self.ms_p20 is not None and self.ms_p20 > self.ms_p50:
            raise ValueError(f"ms_p20: {self.ms_p20} is more than ms_p50 {self.ms_p50}")
        if self.ms_p80 is not None and self.ms_p80 < self.ms_p50:
            raise ValueError(f"ms_p80: {self.ms_p80} is less than ms_p50 {self.ms_p50}")

    @property
    def tokens(self) -> int:
        """Tokens that one run processes: one of each sequence in decoding, else all of the context."""
        return self.batch * (1 if self.direction == "decode" else self.context)

    @property
    def seconds_per_token(self) -> float:
        return self.ms_p50 / 1000 / self.tokens

    @property
    def kind(self) -> str:
        return "attention" if self.mixer.startswith("window") else self.mixer.partition(":")[0]

    @property
    def keys(self) -> int | None:
        """The window, None where there is none."""
        return self._setting("window") or self.window

    @property
    def degree(self) -> int | None:
        """The degree of power or linear attention, None where there is none."""
        return 1 if self.mixer == "linear" else self._setting("p") or self.p

    def _setting(self, name: str) -> int | None:
        match = _MIXER.fullmatch(self.mixer)
        text = match[name] if match else None
        return None if text is None else int(text)


class SavedProfile(msgspec.Struct, frozen=True, kw_only=True):
    """A saved profile, as far as planning reads it."""

    schema: str
    device: Text
    results: list[Measurement]
    torch: Text | None = None
    triton: Text | None = None
    date: Text | None = None
    peak_flops_per_s: Positive | None = None
    bandwidth_bytes_per_s: Positive | None = None
    peak_of: Text | None = None


@dataclass(frozen=True)
class Unmeasured:
    """A mixer that a profile has no training time of, and the contexts (`known`) that it has one of."""

    path: str
    mixer: Mixer
    context: int
    known: tuple[int, ...]

    def brief(self) -> str:
        """Return the mixer in words, and where it was measured."""
        heads = self.mixer.own_heads()
        text = self.mixer.describe()
        if heads is not None:
            shared = f", {heads.kv_heads} key/value heads" if heads.kv_heads != heads.heads else ""
            text += f" with {heads.heads} heads of {heads.head_dim}{shared}"
        known = ", ".join(f"{size:,}" for size in self.known)
        return f"{text} at {self.context:,} tokens, only at {known}" if known else text

    def describe(self) -> str:
        """Return a sentence that says what the file lacks."""
        return f"{self.path} has no {TRAINING} time of {self.brief()}"


@dataclass(frozen=True)
class MeasuredTimes:
    """A saved profile and the file it came from."""

    path: str
    saved: SavedProfile

    @property
    def label(self) -> str:
        """The file and the device it was measured on."""
        return f"{self.path} ({self.saved.device})"

    def peak(self) -> Peak | None:
        """Return the rates that estimates beside these times rest on: the catalogue's, or those measured with them."""
        saved = self.saved
        with suppress(InputError):
            return peak_of(find_device(saved.device))
        if saved.peak_flops_per_s is None or saved.bandwidth_bytes_per_s is None:
            return None
        flops, moved = Fraction(saved.peak_flops_per_s), Fraction(saved.bandwidth_bytes_per_s)
        return Peak(saved.device, flops, moved, saved.peak_of or "its peak")

    def elsewhere(self, name: str) -> str | None:
        """Return a remark where the device `name`, whose rates are counted with, is not the one that was measured."""
        own = self.saved.device
        with suppress(InputError):
            own = find_device(own).name
        if own == name:
            return None
        return f"{self.path} was measured on {own}: times add the mixers' part there to the weights' part on {name}"

    def training_time(self, mixer: Mixer, context: int) -> float | Unmeasured:
        """Return the fewest seconds of a training pass per token of one layer of `mixer`, or what the file lacks.

        Where the cost per token does not depend on the context (power, linear), the longest measured context stands
        in for one that was not measured; for softmax attention the context itself is needed.
        """
        rows = [row for row in self._rows_of(mixer) if row.direction == TRAINING]
        here = [row for row in rows if row.context == context]
        if rows and not here and mixer.degree is not None:
            longest = max(row.context for row in rows)
            here = [row for row in rows if row.context == longest]
        if not here:
            return Unmeasured(self.path, mixer, context, tuple(sorted({row.context for row in rows})))
        return min(row.seconds_per_token for row in here)

    def model_training_time(self, spec: ModelSpec, context: int) -> float | Unmeasured:
        """Return the training seconds per token of all mixers of a model, or the first one that is missing."""
        seconds = 0.0
        for mixer, count in spec.mixer_counts():
            time = self.training_time(mixer, context)
            if isinstance(time, Unmeasured):
                return time
            seconds += time * count
        return seconds

    def weight_flops_per_s(self) -> float | None:
        """Return the FLOP/s that projections and FFNs reached together in training; None where they were not timed."""
        rows = [row for row in self.saved.results if row.part in ("projections", "ffn") and row.direction == TRAINING]
        flops, seconds = sum(row.flops for row in rows), sum(row.ms_p50 / 1000 for row in rows)
        return flops / seconds if flops else None

    def best_chunk(self, mixer: Mixer) -> tuple[int, int] | None:
        """Return the chunk size that trained `mixer` fastest, and of how many; None where there were not several.

        Forward passes tell where no training was measured. Decoding has no chunks to choose.
        """
        if mixer.degree is None:
            return None
        for direction in (TRAINING, FORWARD):
            rows = [row for row in self._rows_of(mixer) if row.chunk_size and row.direction == direction]
            longest = max((row.context for row in rows), default=0)
            timed = [(row.seconds_per_token, row.chunk_size or 0) for row in rows if row.context == longest]
            if len(sizes := {size for _, size in timed}) > 1:
                return min(timed)[1], len(sizes)
        return None

    def _rows_of(self, mixer: Mixer) -> list[Measurement]:
        return [row for row in self.saved.results if row.part == "state" and _is_of(row, mixer)]


def _is_of(row: Measurement, mixer: Mixer) -> bool:
    """Whether a row timed this mixer: the same heads, and the same window or degree."""
    heads = mixer.own_heads()
    if heads is None or (row.heads, row.kv_heads, row.head_dim) != (heads.heads, heads.kv_heads, heads.head_dim):
        return False
    if mixer.kind == "attention":
        return row.kind == "attention" and row.keys == mixer.window_size
    # Power attention of degree 1 does the work of linear attention; the normaliser makes it a little more than that.
    same_kind = row.kind == mixer.kind or (mixer.kind == "linear" and row.kind == "power")
    return same_kind and mixer.degree is not None and mixer.degree == row.degree


def read_profile(path: str, where: str = "--measured") -> MeasuredTimes:
    """Read what `powerplan profile --save` wrote. Raises InputError for a file that is none, or of another version."""
    return MeasuredTimes(path, saved_in(document_at(path, where), SavedProfile))


def document_at(path: str, where: str) -> Document:
    """Read the document of a saved profile. Raises InputError for a file that is none, or of another version."""
    document = parse_json(read_text(Path(path), MAX_FILE_BYTES, "a saved profile has some kilobytes"), path)
    data = document.data
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        problem = "has no schema" if schema is None else f"is of schema {shown(schema)}"
        raise InputError(f"{path} {problem}; wanted is {SCHEMA}, what powerplan profile --save writes", where)
    if data.get("results") == []:
        raise InputError(f"{path} holds no results", where)
    return document


Saved = TypeVar("Saved", bound=SavedProfile)


def saved_in(document: Document, kind: type[Saved]) -> Saved:
    """Return the saved profile that a document holds as `kind`. Raises InputError with the place of a wrong value."""
    check_scalars(document)
    return converted(document, kind)
