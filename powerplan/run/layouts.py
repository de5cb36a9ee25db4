"""Layouts of a training run: how it is split, what is recomputed, and what memory and time that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from powerplan.accounting import Accounting
from powerplan.choices import Schedule
from powerplan.hardware import Peak, si_value
from powerplan.lengths import Lengths
from powerplan.lengths.flops import DocumentRow
from powerplan.lengths.packing import filled_share
from powerplan.run.degrees import Degrees
from powerplan.run.exchanges import Exchange, exchanges_of
from powerplan.run.links import Cluster
from powerplan.run.loads import ModelLoad, model_load
from powerplan.run.memory import Memory, memory_of
from powerplan.run.passing import Split, parts_of, passings_of
from powerplan.run.recipe import Recipe
from powerplan.run.stages import StageLoad, stage_loads, stage_pairs
from powerplan.run.step import DEFAULT_OVERLAP, Efficiency, Overlap, Rates, StepTime, step_of
from powerplan.run.traffic import Links, links_of
from powerplan.training import TRAINING_PASSES

BATCH_TOKENS = 2**22
"""Tokens of an optimizer step where none are given: Llama 3 began with 4M (arXiv 2407.21783, section 3.4.1)."""


@dataclass(frozen=True)
class Batch:
    """The tokens of an optimizer step over all devices. exact: whether a layout may take only this many."""

    tokens: int
    exact: bool = False


@dataclass(frozen=True)
class Setting:
    """What all layouts of a run have in common: devices, their rates and memory, the batch.

    capacity_bytes: memory of one device; None where it is not known, as of a device that only a profile has.
    lengths: documents that are packed whole into sequences and attend to themselves alone; None for one document each.
    overlap: which traffic hides behind compute.
    """

    cluster: Cluster
    peak: Peak
    efficiency: Efficiency
    batch: Batch
    capacity_bytes: int | None
    lengths: Lengths | None = None
    overlap: Overlap = DEFAULT_OVERLAP

    @property
    def fp8_flops_per_s(self) -> float | None:
        """The dense fp8 peak of a device; None where the catalogue has none."""
        device = self.cluster.device
        rate = None if device is None else si_value(device, "fp8_tflops")
        return None if rate is None else float(rate)

    @classmethod
    def of(cls, cluster: Cluster, peak: Peak, efficiency: Efficiency, batch: Batch) -> Setting:
        """Return the setting with the memory that the catalogue has of the device."""
        known = cluster.device.capacity_bytes if cluster.device is not None else None
        return cls(cluster, peak, efficiency, batch, known)


@dataclass(frozen=True)
class Layout:
    """One way to train a model at one context, with the memory and the time that it takes.

    sequences: of an optimizer step, over all devices. flops_per_token: training FLOPs, without recomputation.
    again_flops_per_token: those of matmuls that are computed again, which is a forward pass of all layers or nothing.
    split: how a sequence lies on several devices; None where one has all of it.
    filled: the share of the sequences' tokens that documents fill; all of them without documents.
    """

    degrees: Degrees
    recipe: Recipe
    context: int
    sequences: int
    memory: Memory
    step: StepTime
    flops_per_token: float
    again_flops_per_token: float
    setting: Setting
    split: Split | None = None
    filled: Fraction = Fraction(1)

    @property
    def batch_tokens(self) -> int:
        return self.sequences * self.context

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory of a device; taken as true where that is not known."""
        return self.setting.capacity_bytes is None or self.memory.peak <= self.setting.capacity_bytes

    @property
    def step_s(self) -> float:
        return self.step.seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all devices, without padding."""
        return self.batch_tokens * float(self.filled) / self.step_s

    @property
    def mfu(self) -> float:
        """Training FLOPs over what the dense peak does in the time (PaLM, arXiv 2204.02311, appendix B)."""
        peak = float(self.setting.peak.flops_per_s) * self.degrees.devices
        return self.flops_per_token * self.tokens_per_s / peak

    @property
    def hfu(self) -> float:
        """The same with what is computed again: one more forward pass of the layers where all is recomputed."""
        return self.mfu * (1 + self.again_flops_per_token / self.flops_per_token)


class Layouts:
    """Works out layouts of one model at one context; what layouts share is found once.

    Times rest on FLOPs as the default convention counts them, as the default efficiencies do; MFU and HFU on FLOPs as
    `accounting` counts them.
    """

    def __init__(self, accounting: Accounting, context: int, setting: Setting) -> None:
        self.accounting, self.context, self.setting = accounting, context, setting
        self._timed = Accounting(accounting.spec)
        self._models: dict[Recipe, ModelLoad] = {}
        self._with_recipe: dict[Recipe, tuple[Recipe, ModelLoad]] = {}
        self._stages: dict[tuple[Recipe, int, Schedule], list[tuple[int, StageLoad]]] = {}
        self._links: dict[Degrees, Links] = {}
        self._exchanges: dict[Recipe, tuple[Exchange, ...]] = {}

    @cached_property
    def flops_per_token(self) -> float:
        """Training FLOPs per token."""
        lengths = self.setting.lengths
        row = self.accounting.row(self.context) if lengths is None else self.documents
        return float(TRAINING_PASSES * row.flops_per_token)

    @cached_property
    def documents(self) -> DocumentRow:
        """What the documents of the setting take at the context, as `accounting` counts it."""
        assert self.setting.lengths is not None
        return DocumentRow(self.accounting, self.setting.lengths, self.context)

    @cached_property
    def filled(self) -> Fraction:
        """The share of the sequences' tokens that documents fill."""
        if self.setting.lengths is None:
            return Fraction(1)
        return filled_share(self.documents.pieces, self.context)

    @cached_property
    def again_flops_per_token(self) -> float:
        """FLOPs per token of one more forward pass of all layers."""
        lengths = self.setting.lengths
        load = model_load(self.accounting, self.context, Recipe(), lengths)
        return float(load.layer_flops_per_token / self.filled)

    def sequences_for(self, degrees: Degrees, micro_batch: int) -> int | None:
        """Return the sequences of a step: as many of the batch as all groups of devices can share evenly.

        None where the batch is exact and cannot be shared, or where even one round of micro-batches is more.
        """
        at_once, batch = degrees.sequences_at_once * micro_batch * degrees.round, self.setting.batch
        if batch.exact:
            sequences, rest = divmod(batch.tokens, self.context)
            few = sequences // at_once * degrees.round < degrees.fewest
            return None if rest or sequences % at_once or few else sequences
        rounds = batch.tokens // (at_once * self.context)
        if rounds * degrees.round < degrees.fewest:
            return at_once if at_once == 1 else None
        return rounds * at_once

    def layout(self, degrees: Degrees, recipe: Recipe, sequences: int) -> Layout:
        """Return memory and time of one layout."""
        single, model = self._loaded(recipe)
        key = single, degrees.pp, degrees.schedule
        if key not in self._stages:
            loads = stage_loads(self._models[single], degrees.pp)
            self._stages[key] = _unlike(stage_pairs(loads) if degrees.schedule == "dualpipe" else loads)
        stages = self._stages[key]
        links = self._links.get(degrees)
        if links is None:
            links = self._links[degrees] = links_of(self.setting.cluster, degrees)
        rounds = sequences // (degrees.sequences_at_once * recipe.micro_batch)
        setting = self.setting
        rates = Rates(
            setting.peak,
            setting.efficiency,
            links,
            setting.overlap,
            setting.fp8_flops_per_s,
        )
        split = self._split(model, single, degrees, links)
        passings = [passings_of(stage.exchanges, split) if split else () for _, stage in stages]
        return Layout(
            degrees=degrees,
            recipe=recipe,
            context=self.context,
            sequences=sequences,
            memory=memory_of(model, stages, degrees, rounds, passings),
            step=step_of(model, [stage for _, stage in stages], degrees, rounds, rates, passings),
            flops_per_token=self.flops_per_token,
            again_flops_per_token=self.again_flops_per_token if recipe.recompute == "full" else 0.0,
            setting=self.setting,
            split=split,
            filled=self.filled,
        )

    def _loaded(self, recipe: Recipe) -> tuple[Recipe, ModelLoad]:
        """Return the recipe with one sequence in a micro-batch, and what layers ask for with the recipe as it is."""
        if recipe not in self._with_recipe:
            single = replace(recipe, micro_batch=1)
            if single not in self._models:
                self._models[single] = model_load(self._timed, self.context, single, self.setting.lengths)
            self._with_recipe[recipe] = single, replace(self._models[single], recipe=recipe)
        return self._with_recipe[recipe]

    def _split(self, model: ModelLoad, single: Recipe, degrees: Degrees, links: Links) -> Split | None:
        """Return how a sequence lies on devices; `single` is the recipe with one sequence in a micro-batch."""
        if links.cp is None:
            return None
        if single not in self._exchanges:
            counted = [(load, load.use.count) for load in model.layers]
            self._exchanges[single] = exchanges_of(counted, model.context)
        split = Split(
            ranks=degrees.cp,
            link=links.cp,
            tp=degrees.tp,
            tokens=model.context / degrees.cp,
            sequences=model.recipe.micro_batch,
            element_bytes=float(model.recipe.activation_bytes),
            attention_flops_per_s=float(self.setting.peak.flops_per_s) * self.setting.efficiency.attention,
        )
        return replace(split, parts=parts_of(self._exchanges[single], split))


def _unlike(stages: list[StageLoad]) -> list[tuple[int, StageLoad]]:
    """Return the stages that are unlike all before them, with their numbers: of like ones the first holds the most."""
    first: dict[StageLoad, int] = {}
    for number, stage in enumerate(stages):
        first.setdefault(stage, number)
    return [(number, stage) for stage, number in first.items()]
