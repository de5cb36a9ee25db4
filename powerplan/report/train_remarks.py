"""What `powerplan train` says around its tables: hints, which mixer trains faster from where on, what is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from powerplan.accounting import Accounting
from powerplan.longest import first_that
from powerplan.mixers.formulas import Convention
from powerplan.report.advice import speed_of
from powerplan.report.parts import on_host
from powerplan.report.width import wrapped
from powerplan.run.layouts import Layout
from powerplan.run.loads import has_keys, state_flops
from powerplan.run.plan import TrainingPlan
from powerplan.run.step import Efficiency
from powerplan.spec import ModelSpec

ACCURACY = (
    "How near: memory is within 1% (weights, gradients, optimizer) and 7% (activations) of torch's FSDP2 tracker, "
    "and within 26% of the peaks that torchtitan publishes; steps are within 15% of published ones of Llama 3 8B to "
    "405B on H100s, and -37 to +76% of others (docs/training.md)."
)
"""What estimates were checked against; tests/run/test_tracker_fsdp.py and published.yaml have the figures."""

UNSURE = 0.15
"""The share of activations and working memory by which their estimate may be off."""

LONGEST = 2**24
"""Tokens up to which it is looked for where one mixer is faster than another."""


@dataclass(frozen=True)
class OtherRun:
    """The same tokens with other mixers.

    name: what is other. mixer: as --mixer takes it, where it is in every layer. recommended: whether `recommend` puts
    it first.
    """

    name: str
    mixer: str
    plan: TrainingPlan
    recommended: bool = False


def hints(layout: Layout) -> list[str]:
    """Return what would make room or time, where one part stands out."""
    hints = []
    memory, recipe = layout.memory, layout.recipe
    if recipe.loss == "whole" and memory.place == "the loss" and memory.working > memory.peak / 5:
        hints.append(f"--loss chunked would not hold all logits at once: they take {memory.working / 1e9:,.3g} GB here")
    capacity, unsure = layout.setting.capacity_bytes, UNSURE * (memory.activations + memory.working)
    if capacity is not None and 0 <= capacity - memory.peak < unsure:
        free = (capacity - memory.peak) / 1e9
        hints.append(f"tight: {free:,.3g} GB stay free, and activations are known to within {unsure / 1e9:,.3g} GB")
    worst = max(layout.step.traffic, key=lambda part: part[1], default=("", 0.0))
    if worst[1] > layout.step_s / 5:
        more = "; some trainers hide it: --overlap experts=1, --schedule dualpipe" if worst[0] == "experts" else ""
        hints.append(f"{worst[1] / layout.step_s:.0%} of a step waits for communication ({worst[0]}){more}")
    return [line for hint in hints for line in wrapped(hint)]


def speed_lines(plan: TrainingPlan, others: Sequence[OtherRun]) -> list[str]:
    """Return from where on power attention trained faster than attention as measured, and as this plan has it.

    Nothing where no run has power attention of degree 2, or mixers have measured times.
    """
    share, own = plan.setting.efficiency, plan.accounting.spec
    compared = [own, *(other.plan.accounting.spec for other in others)]
    mixers = [mixer for spec in compared for mixer in spec.mixers() if mixer.degree == 2]
    text = speed_of(mixers)
    if text is None or share.measured_s is not None:
        return []
    planned = None
    whole = [spec for spec in compared if spec is not own and all(mixer.degree == 2 for mixer in spec.mixers())]
    if whole:
        planned = planned_crossover(own, whole[0], share)
    here = "" if planned is None else f"; at the shares of this plan below about {_thousands(planned)}"
    return wrapped(f"measured: {text}{here}.")


def planned_crossover(one: ModelSpec, other: ModelSpec, share: Efficiency) -> int | None:
    """Return from how many tokens on the mixers of `other` take less time than those of `one`, at shares of the peak.

    None where that is so at no context, or at every one.
    """

    def slower(tokens: int) -> bool:
        return _mixer_time(one, tokens, share) >= _mixer_time(other, tokens, share)

    first = first_that(lambda tokens: tokens > LONGEST or slower(tokens))
    return None if first > LONGEST or first == 1 else first


def _mixer_time(spec: ModelSpec, tokens: int, share: Efficiency) -> float:
    """Return the time of all mixers for a token, in FLOPs at the whole peak."""
    time = 0.0
    for use in Accounting(spec).uses:
        if (mixer := use.layer.mixer) is not None:
            flops = float(state_flops(mixer, tokens, Convention(), None)) * use.count
            time += flops / (share.attention if has_keys(mixer, tokens) else share.recurrent)
    return time


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:.0f}k" if tokens >= 1000 else f"{tokens}"


def assumptions(plan: TrainingPlan) -> list[str]:
    """Return how near estimates are, and what they rest on."""
    recipe = plan.phases[0].layout.recipe
    checked = [] if plan.setting.efficiency.measured_s is not None else wrapped(ACCURACY)
    copy = "with an fp32 copy of the weights" if recipe.master == "fp32" else "with no other copy of the weights"
    logits = "the logits of all tokens" if recipe.loss == "whole" else "the logits of some tokens"
    formats = f"{recipe.dtype}, matmuls in {recipe.matmuls_dtype}," if recipe.matmuls_dtype else recipe.dtype
    return checked + wrapped(
        f"{recipe.optimizer} in {formats} {copy}, {logits} at once; {_rates(plan)}. {_hidden(plan)}"
        f"{on_host(plan.accounting)}"
    )


def _rates(plan: TrainingPlan) -> str:
    share, recipe, peak = plan.setting.efficiency, plan.phases[0].layout.recipe, plan.setting.peak.kind
    if share.measured_s is not None:
        return f"mixers as measured, matmuls with weights at {share.weights:.0%} of {peak}"
    parts = [f"{share.weights:.0%} in matmuls with weights"]
    if share.experts is not None:
        parts.append(f"{share.experts:.0%} in those of routed experts")
    parts += [f"{share.attention:.0%} in attention", f"{share.recurrent:.0%} in recurrent state"]
    fast = f", and {share.fp8:.0%} of the fp8 peak in layers' matmuls" if recipe.matmuls_dtype else ""
    text = f"assumed of {peak}: {', '.join(parts)}{fast} (--efficiency)"
    if share.experts is None and any(plan.accounting.spec.mixtures()):
        text += "; DeepSeek-V3's own run implies 25% in those of routed experts, --efficiency experts=0.25"
    return text


def _hidden(plan: TrainingPlan) -> str:
    """Return which traffic is taken to hide, and where rows for experts go."""
    overlap, degrees, node = plan.setting.overlap, plan.layout.degrees, plan.setting.cluster.node_devices
    tensor = "half" if overlap.tensor == 0.5 else f"{overlap.tensor:.0%}"
    parts = [
        "gathers of weights and sums of gradients behind all compute",
        "rings behind attention",
        f"{tensor} of tensor parallelism behind matmuls",
    ]
    if share := overlap.of_experts(degrees.schedule):
        whole = "what experts get and give" if share == 1 else f"{share:.0%} of what experts get and give"
        parts.append(f"{whole} behind other micro-batches")
    text = f"Communication is taken to hide: {', '.join(parts)} (--overlap)."
    nodes = -(-degrees.ep * degrees.tp // node)
    limits = [limit for moe in plan.accounting.spec.mixtures() if (limit := moe.nodes_sent_to(nodes))]
    if degrees.ep > 1 and nodes > 1 and limits:
        text += f" A token goes to experts on at most {max(limits)} of {nodes} nodes, and once to each."
    return text
