"""What `train` is asked for: options as texts or numbers to a plan's choices, rates, cluster and shares of the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from powerplan.accounting import Accounting
from powerplan.answers.base import Whole, check_choice, optional, text_of
from powerplan.choices import Recompute, Schedule
from powerplan.errors import InputError, parameter, shown
from powerplan.hardware import Device, Peak, needs_device, peak_of
from powerplan.hardware import devices as known_devices
from powerplan.measured import MeasuredTimes, Unmeasured
from powerplan.run.degrees import MAX_PARALLEL, Degrees, parse_degrees
from powerplan.run.efficiency import DEFAULT, parse_efficiency
from powerplan.run.links import Cluster, cluster_of
from powerplan.run.plan import Choices, Phase
from powerplan.run.recipe import Recipe
from powerplan.run.search import MICRO_BATCHES, RECOMPUTE
from powerplan.run.step import Efficiency
from powerplan.units import parse_context, parse_count, parse_integer, parse_rate

AUTO = "auto"
"""The word for a degree, a recomputation or a micro-batch that the plan may choose."""


def read_stages(stages: Sequence[str], context: Whole | None, tokens: Whole | float | None) -> list[str]:
    """Return the texts of stages; raises InputError where there are some and a context or tokens beside them."""
    texts = [stages] if isinstance(stages, str) else list(stages)
    if texts and (context is not None or tokens is not None):
        given = parameter("context" if context is not None else "tokens")
        raise InputError(f"has tokens and contexts of its own: leave {given} out", parameter("stages"))
    return texts


def read_choices(
    recipe: Recipe, recompute: str, zero: Whole, schedule: Schedule, parallel: str | Degrees, micro_batch: Whole
) -> Choices:
    """Return what the plan may choose: one value of what is given, and of what is "auto" all that there are."""
    again, shards = read_recompute(recompute), parse_integer(text_of(zero), parameter("zero"), 0, 3)
    check_choice(schedule, get_args(Schedule), "schedule")
    if isinstance(parallel, Degrees) and schedule != parallel.schedule == "1f1b":
        parallel = replace(parallel, schedule=schedule)
    if schedule == "dualpipe" and shards > 1 and not isinstance(parallel, Degrees):
        problem = f"dualpipe keeps weights and gradients whole within a step; give {parameter('zero', '1')}"
        raise InputError(problem, parameter("schedule"))
    degrees = parallel if isinstance(parallel, Degrees) else read_degrees(str(parallel), shards, schedule)
    batches: tuple[int, ...] = MICRO_BATCHES
    if (size := text_of(micro_batch)) != AUTO:
        batches = (parse_integer(size, parameter("micro_batch"), 1, MAX_PARALLEL),)
    return Choices(recipe, None if degrees is None else (degrees,), again, batches, shards, schedule)


def read_peak(device: Device | None, profile: MeasuredTimes | None, recipe: Recipe) -> Peak:
    """Return the rates of the device, or of the one that was measured; raises InputError where there is neither."""
    rates: Literal["bf16", "fp32"] = "fp32" if recipe.dtype == "fp32" else "bf16"
    peak = peak_of(device, rates) if device is not None else profile.peak() if profile is not None else None
    if peak is None:
        raise InputError(
            "a training run needs a device, such as h100-sxm (powerplan hardware lists them)", parameter("gpu")
        )
    return peak


def check_matmuls(device: Device | None, recipe: Recipe) -> None:
    """Raise InputError where matmuls are in fp8 and no fp8 rate of the device is known."""
    if recipe.matmuls_dtype is None:
        return
    if device is None:
        raise needs_device("matmuls_dtype")
    if device.fp8_tflops is None:
        known = ", ".join(name for name, other in known_devices().items() if other.fp8_tflops is not None)
        problem = f"{device.name} has no fp8 matrix rate in the catalogue; those with one: {known}"
        raise InputError(problem, parameter("matmuls_dtype"))


def read_degrees(text: str, zero: int, schedule: Schedule) -> Degrees | None:
    return None if text == AUTO else parse_degrees(text, parameter("parallel"), zero, schedule)


def read_recompute(text: str) -> tuple[Recompute, ...]:
    """Return what may be computed again: one of the words, or all of them for "auto"."""
    check_choice(text, (*RECOMPUTE, AUTO), "recompute")
    return tuple(word for word in RECOMPUTE if text in (word, AUTO))


def read_efficiency(given: str | float | None) -> Efficiency | None:
    return None if given is None else parse_efficiency(str(given))


def read_phase(text: str) -> Phase:
    """Return the tokens and the context of a stage such as "950B@8k"."""
    where = parameter("stages")
    tokens, at, context = text.partition("@")
    if not at:
        raise InputError(f"{shown(text)} is not a stage; write tokens@context, as 950B@8k", where)
    return Phase(parse_count(tokens.strip(), where, "a count of tokens"), parse_context(context.strip(), where))


def read_cluster(
    device: Device | None,
    devices: int,
    node_devices: Whole | None,
    link_gbs: float | str | None,
    network_gbs: float | str | None,
) -> Cluster:
    node = None
    if node_devices is not None:
        node = parse_integer(text_of(node_devices), parameter("node_devices"), 1, MAX_PARALLEL)
    rates = {
        name: optional(parse_rate, name, value)
        for name, value in (("link_gbs", link_gbs), ("network_gbs", network_gbs))
    }
    if device is None:
        if devices > 1:
            raise InputError("several devices need one of the catalogue, for its links", parameter("gpu"))
        return Cluster(None, 1, 1, None, None)
    return cluster_of(device, devices, node_devices=node, **rates)


def efficiency_of(
    accounting: Accounting, context: int, peak: Peak, given: Efficiency | None, profile: MeasuredTimes | None
) -> tuple[Efficiency, list[str]]:
    """Return the shares of the peak that work reaches, with what a profile measured in place of them, and remarks."""
    share = given or DEFAULT
    if profile is None:
        return share, []
    remarks = [remark] if (remark := profile.elsewhere(peak.name)) else []
    rate = profile.weight_flops_per_s()
    if rate is not None and given is None:
        share = replace(share, weights=min(1.0, rate / float(peak.flops_per_s)))
    mixers = profile.model_training_time(accounting.spec, context)
    if isinstance(mixers, Unmeasured):
        return share, [*remarks, f"{mixers.describe()}: its share of the peak is counted instead"]
    return replace(share, measured_s=mixers), remarks
