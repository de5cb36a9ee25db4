"""What an export needs of a training run, and how it says what a trainer does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from powerplan.accounting import positions_text
from powerplan.errors import InputError, one_line, parameter
from powerplan.run.degrees import Degrees
from powerplan.run.recipe import Recipe
from powerplan.spec import LayerUse, ModelSpec
from powerplan.units import format_items


@dataclass(frozen=True)
class Job:
    """A training run, or one phase of it: a model, its sequences, how they are split over devices, and for how long.

    context: tokens of a sequence. batch_tokens: tokens of an optimizer step over all devices. tokens: of the whole run.

    Raises:
        InputError: the batch is no whole number of sequences, or groups of devices cannot share it evenly.
    """

    spec: ModelSpec
    context: int
    degrees: Degrees
    recipe: Recipe
    batch_tokens: int
    tokens: int

    def __post_init__(self) -> None:
        where = parameter("batch_tokens")
        if self.batch_tokens % self.context:
            problem = f"{self.batch_tokens:,} tokens are no whole number of sequences of {self.context:,}"
            raise InputError(problem, where)
        at_once = self.degrees.sequences_at_once * self.recipe.micro_batch
        if self.sequences % at_once:
            groups = f"{self.degrees.sequences_at_once:,} groups of devices with {self.recipe.micro_batch:,} at once"
            raise InputError(f"{self.sequences:,} sequences cannot be shared evenly by {groups}", where)

    @property
    def sequences(self) -> int:
        """Sequences of an optimizer step, over all devices."""
        return self.batch_tokens // self.context

    @property
    def steps(self) -> int:
        """Optimizer steps, the last one perhaps short."""
        return -(-self.tokens // self.batch_tokens)

    def title(self) -> str:
        """Return what is trained, and on what, in a line."""
        devices = format_items(self.degrees.devices, "device")
        split = "" if self.degrees.devices == 1 else f" ({self.degrees.describe()})"
        return f"{self.spec.name}: {self.tokens:,} tokens in sequences of {self.context:,} on {devices}{split}"


def where_of(uses: Iterable[LayerUse], spec: ModelSpec) -> str:
    """Return which layers these are: "layers 0-19, 20 of 32", or "all layers"."""
    spans = tuple({span: None for use in uses for span in use.positions})
    count = sum(len(span) for span in spans)
    if count == spec.layer_count:
        return "all layers"
    places = positions_text(spans).removesuffix(f" ({count})")
    return f"{places}, {count:,} of {spec.layer_count:,}"


class Lacks:
    """What a trainer does not have of a model, in the order in which it was found, each with its layers."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._found: dict[str, list[LayerUse]] = {}

    def add(self, what: str, uses: Iterable[LayerUse] = ()) -> None:
        """Add a clause; `uses` are the layers that it is about, none where it is about the model."""
        self._found.setdefault(what, []).extend(uses)

    def add_those(self, clauses: Mapping[str, bool], uses: Iterable[LayerUse] = ()) -> None:
        """Add the clauses that are true, in their order, all about the same layers."""
        for what, is_so in clauses.items():
            if is_so:
                self.add(what, uses)

    def lines(self) -> list[str]:
        """Return a line for each clause."""
        return [f"{what} ({where_of(uses, self._spec)})" if uses else what for what, uses in self._found.items()]


def comments(lines: Iterable[str]) -> list[str]:
    """Return lines as comments of a shell script or a TOML file; no text of the input can end one."""
    return [f"# {one_line(line)}" for line in lines]


NOT_SIZES = (
    "powerplan knows sizes: data, tokenizer, learning rates, positions, activation functions and routers are yours"
)
"""The end of every export."""
