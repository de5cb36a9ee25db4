"""Whether a training run fits, how long it takes and what it costs; and what other mixers would make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from powerplan.accounting import Accounting
from powerplan.answers.base import (
    Answer,
    Model,
    Whole,
    check_choice,
    optional,
    read_device,
    read_devices,
    read_measured,
    read_model,
    refuse_measured_documents,
    text_of,
)
from powerplan.answers.train_inputs import (
    AUTO,
    check_matmuls,
    efficiency_of,
    read_choices,
    read_cluster,
    read_efficiency,
    read_peak,
    read_phase,
    read_stages,
)
from powerplan.choices import Loss, Master, MatmulsDtype, Optimizer, Schedule, Trainer, TrainingDtype
from powerplan.errors import InfeasibleError, InputError, parameter
from powerplan.hardware import Device
from powerplan.lengths import LengthsInput, read_lengths
from powerplan.measured import MeasuredTimes
from powerplan.mixers.formulas import Convention
from powerplan.report.render import Report
from powerplan.report.train import train_report
from powerplan.report.train_remarks import OtherRun
from powerplan.run.degrees import Degrees, problems
from powerplan.run.efficiency import parse_overlap
from powerplan.run.layouts import BATCH_TOKENS, Batch, Setting
from powerplan.run.links import Cluster
from powerplan.run.plan import Choices, Phase, PhasePlan, TrainingPlan, plan_training
from powerplan.run.recipe import Recipe
from powerplan.run.step import DEFAULT_OVERLAP
from powerplan.search import Request
from powerplan.search import recommend as search
from powerplan.swap import swap_text
from powerplan.training import TOKENS_PER_PARAMETER, alternatives, budget_of
from powerplan.units import parse_context, parse_count, parse_money

DEFAULT_CONTEXT = "64k"

MOST_NEAR = 60
"""Layouts of the model as it is that are tried again with other mixers: the fastest ones, of up to 6,000."""


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainAnswer(Answer):
    """A training run.

    plan: its phases, each with its layout: memory, step, hours. others: the same tokens with other mixers, the first of
    them what `recommend` puts first.
    """

    plan: TrainingPlan
    others: tuple[OtherRun, ...]

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the devices' memory."""
        return self.plan.fits

    def export(self, trainer: Trainer) -> str:
        """Return the plan as another trainer reads it: a TOML of torchtitan, arguments of Megatron-Core.

        What the trainer cannot build or set is a comment in the text.

        Raises:
            InputError: there is no such trainer, or the run has several stages.
        """
        from powerplan.run.export import EXPORTS, Job  # Most plans are not exported.

        check_choice(trainer, get_args(Trainer), "trainer")
        if len(self.plan.phases) > 1:
            raise InputError(f"writes one stage, and the run has {len(self.plan.phases)}", parameter("trainer"))
        (phase,) = self.plan.phases
        layout = phase.layout
        sizes = layout.batch_tokens, phase.phase.tokens
        return EXPORTS[trainer](Job(self.plan.accounting.spec, layout.context, layout.degrees, layout.recipe, *sizes))

    def _report(self) -> Report:
        return train_report(self.plan, self.others)


def train(
    model: Model,
    context: Whole | None = None,
    *,
    gpu: str | Device | None = None,
    devices: Whole = 1,
    tokens: Whole | float | None = None,
    stages: Sequence[str] = (),
    batch_tokens: Whole | None = None,
    lengths: LengthsInput | None = None,
    micro_batch: Whole = AUTO,
    parallel: str | Degrees = AUTO,
    zero: Whole = 3,
    schedule: Schedule = "1f1b",
    recompute: str = AUTO,
    optimizer: Optimizer = "adamw",
    master: Master = "fp32",
    loss: Loss = "whole",
    efficiency: str | float | None = None,
    overlap: str | None = None,
    measured: str | Path | MeasuredTimes | None = None,
    price: float | str | None = None,
    node_devices: Whole | None = None,
    link_gbs: float | str | None = None,
    network_gbs: float | str | None = None,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: TrainingDtype = "bf16",
    matmuls_dtype: MatmulsDtype | None = None,
    gradients_dtype: TrainingDtype | None = None,
    moments_dtype: TrainingDtype | None = None,
) -> TrainAnswer:
    """Return how a model is trained, as `powerplan train` prints it: memory, layout, step time, hours, money.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, a spec, or a config (as load_model takes it).
        context: tokens of a sequence, as 131072 or "128k"; "64k" where neither it nor `stages` is given.
        gpu: the exact name of a device, such as "h100-sxm"; may be left out where `measured` has rates of one.
        devices: how many there are.
        tokens: training tokens, as 3e11 or "300B"; 20 per active parameter where left out.
        stages: stages of the run in place of tokens and context, as ["950B@8k", "50B@128k"].
        batch_tokens: tokens of an optimizer step over all devices; about 4M where left out.
        lengths: documents of many lengths, as `wsfr` takes them, packed whole into the sequences of each context; they
            attend to themselves alone. The plan has the time that devices wait for longer documents.
        micro_batch: sequences that a device works on at once, or "auto".
        parallel: degrees such as "fsdp=8,cp=8", or "auto" for the fastest that fit.
        zero: what devices that see different tokens share: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights
            too (FSDP).
        schedule: "1f1b", or "dualpipe": a pipeline that is fed from both ends and hides the traffic of experts.
        recompute: "none", "selective" or "full", or "auto" for the least that fits.
        optimizer: "adamw", "adamw-8bit" or "muon".
        master: "fp32" for a copy of the weights in fp32 that the optimizer works on; "none" for none.
        loss: "whole" for the logits of all tokens at once, or "chunked".
        efficiency: shares of the device's dense peak, as 0.5 or "weights=0.6,attention=0.5,recurrent=0.3,fp8=0.5", of
            FLOPs as Convention() counts them.
        overlap: shares of traffic that hide behind compute, as "experts=0.9,tensor=0.5".
        measured: a file of `powerplan profile --save`: measured times of mixers and matmuls in place of shares.
        price: money for an hour of one device.
        node_devices, link_gbs, network_gbs: devices of a node, and GB/s per device and direction within and between
            nodes, where they are not the catalogue's.
        mixer: the mixer to put into every layer first, such as "power:p=2".
        convention: how FLOPs are counted in MFU and HFU; Convention() where None. Times do not depend on it.
        dtype: the number format of weights in matmuls and of activations: bf16, fp16 or fp32.
        matmuls_dtype: "fp8" for layers' products with weights in fp8, and tokens that are sent to experts so.
        gradients_dtype, moments_dtype: that of gradients and of the optimizer's moments: fp32 with a master copy, else
            `dtype`, where left out.

    Returns:
        The answer: `plan` has the layout of each stage, hours, money and energy.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.
        InfeasibleError: no layout fits; the message says what is lacking.

    Examples:
        >>> answer = train("llama-3-8b", "128k", gpu="h100-sxm", devices=64, price=2.5)
        >>> answer.fits
        True
    """
    count, share = read_devices(devices), read_efficiency(efficiency)
    dollars = optional(parse_money, "price", price)
    stage_texts = read_stages(stages, context, tokens)
    at = parse_context(text_of(DEFAULT_CONTEXT if context is None else context), parameter("context"))
    wanted = optional(parse_count, "tokens", tokens, "a count of tokens")
    step = optional(parse_context, "batch_tokens", batch_tokens)
    recipe = Recipe(
        optimizer,
        dtype,
        master,
        "none",
        loss,
        gradients_dtype=gradients_dtype,
        moments_dtype=moments_dtype,
        matmuls_dtype=matmuls_dtype,
    )
    hidden = DEFAULT_OVERLAP if overlap is None else parse_overlap(str(overlap))
    choices = read_choices(recipe, recompute, zero, schedule, parallel, micro_batch)
    profile, device = read_measured(measured), read_device(gpu)
    peak = read_peak(device, profile, recipe)
    check_matmuls(device, recipe)

    def joined(number: int) -> Cluster:
        return read_cluster(device, number, node_devices, link_gbs, network_gbs)

    refuse_measured_documents(lengths, profile)
    documents = None if lengths is None else read_lengths(lengths)
    cluster = joined(count)
    phases = [read_phase(text) for text in stage_texts]
    loaded = read_model(model, mixer, [phase.context for phase in phases] or [at], trained=True)
    accounting, notes = Accounting(loaded.spec, convention), list(loaded.notes)
    if not phases:
        default = TOKENS_PER_PARAMETER * accounting.active_parameters.with_embeddings
        phases = [Phase(wanted or default, at)]
        if wanted is None:
            notes.append(f"no tokens given: 20 per active parameter assumed; give {parameter('tokens')}")
    positions, longest = loaded.spec.position_embeddings, max(phase.context for phase in phases)
    if positions is not None and positions < longest:
        notes.append(f"learned positions end at {positions:,}: a context of {longest:,} is a what-if")
    batch = Batch(step or BATCH_TOKENS, exact=step is not None)
    plans: list[PhasePlan] = []
    for phase in phases:
        found, remarks = efficiency_of(accounting, phase.context, peak, share, profile)
        setting = replace(Setting.of(cluster, peak, found, batch), lengths=documents, overlap=hidden)
        plans += plan_training(accounting, [phase], setting, choices, dollars).phases
        notes += remarks
    plan = TrainingPlan(accounting, tuple(plans), plans[-1].layout.setting, dollars)
    if choices.degrees is None and not plan.fits:
        raise InfeasibleError(_what_lacks(plan, choices, joined))
    others = _others(plan, phases[0], choices) if profile is None and len(phases) == 1 else []
    return TrainAnswer(plan=plan, others=tuple(others), notes=tuple(dict.fromkeys(notes)))


def _others(plan: TrainingPlan, phase: Phase, choices: Choices) -> list[OtherRun]:
    """Return the same run with what `recommend` puts first, and with other mixers in every layer.

    Over documents there is no recommendation: `recommend` judges whole contexts.
    """
    accounting, setting = plan.accounting, plan.setting
    (own,) = plan.phases
    near = dict.fromkeys(layout.degrees for layout in (own.layout, *own.others[:MOST_NEAR]))

    def planned(other: Accounting) -> TrainingPlan | None:
        """Return the plan of a model; None where its heads allow none of the degrees that were asked for."""
        degrees = tuple(way for way in near if not any(problems(way, other.spec, phase.context)))
        if not degrees and choices.degrees is not None:
            return None
        return plan_training(other, [phase], setting, replace(choices, degrees=degrees or None), plan.price)

    runs: list[tuple[str, str, TrainingPlan | None, bool]] = []
    seen = []
    winner = None
    if setting.lengths is None:
        request = Request(contexts=[phase.context], convention=accounting.convention)
        winner = search(accounting.spec, request).recommended
    if winner is not None and not winner.plan.unchanged:
        best = Accounting(winner.spec, accounting.convention)
        seen.append(best.spec.layers)
        runs.append((winner.label, winner.mixer, planned(best), True))
    for other in alternatives(budget_of(accounting, phase.context, tokens=phase.tokens)):
        swap, model = other.swap, other.budget.accounting
        if swap is not None and model.spec.layers not in seen:
            seen.append(model.spec.layers)
            runs.append((swap.describe(), swap_text(swap), planned(model), False))
    return [
        OtherRun(label, text, found, recommended=recommended)
        for label, text, found, recommended in runs
        if found is not None and found.fits
    ]


def _what_lacks(
    plan: TrainingPlan,
    choices: Choices,
    joined: Callable[[int], Cluster],
) -> str:
    """Return what the devices lack, and on how many the run fits, of up to 4,096 times as many: each time twice.

    joined: returns so many of the devices, with their links; raises InputError where these are not known.
    """
    worst = max((phase.layout for phase in plan.phases), key=lambda layout: layout.memory.peak)
    setting, name = plan.setting, plan.accounting.spec.name
    assert setting.capacity_bytes is not None
    need, has = (
        f"{size / 1e9:{',.0f' if size >= 1e12 else '.4g'}}" for size in (worst.memory.peak, setting.capacity_bytes)
    )
    devices = setting.cluster.devices
    text = (
        f"{name} at {worst.context:,} tokens does not fit {devices:,} x {setting.peak.name}: {need} GB at the "
        f"peak in each, which has {has} GB ({worst.degrees.describe()}, recompute {worst.recipe.recompute})"
    )
    phases = [phase.phase for phase in plan.phases]
    if choices.recipe.loss == "whole":
        chunked = replace(choices, recipe=replace(choices.recipe, loss="chunked"))
        if plan_training(plan.accounting, phases, setting, chunked).fits:
            return f"{text}; it fits with {parameter('loss', 'chunked')}"
    parameters, recipe = plan.accounting.total_parameters.with_embeddings, choices.recipe
    least = parameters * (recipe.master_bytes + recipe.gradient_bytes)  # All devices hold this at any degrees.
    for more in (2**power * devices for power in range(1, 13)):
        if least > more * setting.capacity_bytes:
            continue  # A search takes up to two seconds.
        try:
            bigger = replace(setting, cluster=joined(more))
            if plan_training(plan.accounting, phases, bigger, choices).fits:
                return f"{text}; it fits {more:,} devices"
        except InputError:  # More devices than the known links join, or than can share the batch.
            break
    return text
