"""A training run from its tokens to its end: layouts for each phase, steps, hours, money and energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from powerplan.accounting import Accounting
from powerplan.choices import Recompute, Schedule
from powerplan.errors import InputError, parameter
from powerplan.run.degrees import Degrees, check_degrees
from powerplan.run.documents import DocumentPlan, with_documents
from powerplan.run.layouts import Layout, Layouts, Setting
from powerplan.run.recipe import Recipe
from powerplan.run.search import MAX_TRIED, MICRO_BATCHES, RECOMPUTE, Found, all_degrees, find_layouts


@dataclass(frozen=True)
class Phase:
    """A part of a training run: so many tokens, in sequences of one context."""

    tokens: int
    context: int


@dataclass(frozen=True)
class Choices:
    """What a plan may choose; where there is one value, it is given.

    degrees: ways to split the run; None for all that divide the devices. micro_batches: sequences that a device works
    on at once.
    """

    recipe: Recipe
    degrees: tuple[Degrees, ...] | None = None
    recompute: tuple[Recompute, ...] = RECOMPUTE
    micro_batches: tuple[int, ...] = MICRO_BATCHES
    zero: int = 3
    schedule: Schedule = "1f1b"


@dataclass(frozen=True)
class PhasePlan:
    """One phase with the layout that it is trained in. others: the next best layouts. tried: how many were compared.

    documents: what documents of many lengths make of it, where there are such. Steps of layouts then have the time that
    devices wait for longer documents.
    """

    phase: Phase
    layout: Layout
    others: tuple[Layout, ...] = field(repr=False)  # Hundreds of layouts: half a megabyte of text.
    tried: int
    documents: DocumentPlan | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps, the last one perhaps short."""
        return -(-self.phase.tokens // (self.layout.batch_tokens * self.layout.filled))

    @property
    def seconds(self) -> float:
        return self.phase.tokens / self.layout.tokens_per_s


@dataclass(frozen=True)
class TrainingPlan:
    """A training run: its phases, what they take in all, and what that costs.

    price: money for an hour of one device; None where it is not known.
    """

    accounting: Accounting
    phases: tuple[PhasePlan, ...]
    setting: Setting
    price: Fraction | None = None

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the devices' memory."""
        return all(phase.layout.fits for phase in self.phases)

    @property
    def layout(self) -> Layout:
        """The layout of the phase that takes longest."""
        return max(self.phases, key=lambda phase: phase.seconds).layout

    @property
    def tokens(self) -> int:
        return sum(phase.phase.tokens for phase in self.phases)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def days(self) -> float:
        return self.seconds / 86400

    @property
    def gpu_hours(self) -> float:
        """Hours of one device, over all devices."""
        return self.seconds / 3600 * self.setting.cluster.devices

    @property
    def cost(self) -> float | None:
        """Money for the device hours; None without a price."""
        return None if self.price is None else self.gpu_hours * float(self.price)

    @property
    def energy_kwh(self) -> float | None:
        """Kilowatt-hours at the devices' board power, which is a bound: hosts, network and cooling come on top."""
        device = self.setting.cluster.device
        watts = None if device is None else device.tdp_w
        return None if watts is None else self.gpu_hours * watts / 1000


def plan_training(
    accounting: Accounting,
    phases: Sequence[Phase],
    setting: Setting,
    choices: Choices,
    price: Fraction | None = None,
) -> TrainingPlan:
    """Return how a model is trained: for each phase the fastest layout that fits, or the one nearest to fitting.

    Raises:
        InputError: degrees are given and impossible, or no layout can share the batch.
    """
    planned = [_planned(accounting, setting, phase, choices) for phase in phases]
    return TrainingPlan(accounting, tuple(planned), setting, price)


def _planned(accounting: Accounting, setting: Setting, phase: Phase, choices: Choices) -> PhasePlan:
    layouts = Layouts(accounting, phase.context, setting)
    found = _found(layouts, choices)
    if setting.lengths is None:
        return PhasePlan(phase, found.best, found.others, found.tried)

    def find_unmasked() -> Layout:
        whole = Layouts(accounting, phase.context, replace(setting, lengths=None))
        return _found(whole, choices).best

    found, documents = with_documents(layouts, found, find_unmasked)
    return PhasePlan(phase, found.best, found.others, found.tried, documents)


def _found(layouts: Layouts, choices: Choices) -> Found:
    """Return the best layouts of one model at one context; raises InputError where none can share the batch."""
    devices = layouts.setting.cluster.devices
    if choices.degrees is not None:
        for given in choices.degrees:
            check_degrees(given, devices, layouts.accounting.spec, layouts.context)
        ways = list(choices.degrees)
    else:
        ways = all_degrees(layouts, choices.zero, choices.schedule)
        if not ways and choices.schedule == "dualpipe":
            problem = f"dualpipe needs an even number of pipeline stages, and no layout of {devices:,} devices has one"
            raise InputError(problem, parameter("schedule"))
        ways = ways[: MAX_TRIED // len(choices.micro_batches)]
    found = find_layouts(layouts, choices.recipe, choices.recompute, choices.micro_batches, ways)
    if found is None:
        raise InputError(_batch_problem(layouts, choices), parameter("batch_tokens"))
    return found


def _batch_problem(layouts: Layouts, choices: Choices) -> str:
    batch, context = layouts.setting.batch, layouts.context
    if batch.exact and batch.tokens % context:
        return f"{batch.tokens:,} tokens are no whole number of sequences of {context:,}"
    sequences = f"{batch.tokens:,} tokens are {batch.tokens // context:,} sequences of {context:,}"
    if choices.degrees is None or len(choices.degrees) > 1:
        return f"{sequences}; no layout of {layouts.setting.cluster.devices:,} devices can share them evenly"
    (degrees,) = choices.degrees
    at_once = degrees.sequences_at_once * min(choices.micro_batches)
    if degrees.schedule == "dualpipe":
        least = at_once * degrees.fewest
        return f"{sequences}; dualpipe takes micro-batches in pairs, at least {least:,} sequences with pp {degrees.pp}"
    if degrees.round > 1:
        turns = f"interleaved stages take {degrees.pp:,} micro-batches in turn"
        return f"{sequences}; {turns}, so that {at_once * degrees.round:,} are at work, which does not divide them"
    return f"{sequences}; fsdp and replicas work on {at_once:,} at once, which does not divide them"
