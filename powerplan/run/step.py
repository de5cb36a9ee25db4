"""How long a training step takes: compute at stated rates, traffic that nothing hides, bubbles, the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from powerplan.hardware import Peak
from powerplan.run.degrees import Degrees
from powerplan.run.loads import ModelLoad
from powerplan.run.passing import Passing
from powerplan.run.stages import StageLoad
from powerplan.run.traffic import Links, traffic_of
from powerplan.training import TRAINING_PASSES

LOSS_PASSES_BYTES = 36
"""Bytes read and written per logit by an eager cross entropy in fp32 over bf16 logits: cast 2 + 4, log-softmax 4 + 4,
the gradient of the pick 4, that of log-softmax 4 + 4 + 4, cast back 4 + 2."""

TENSOR_HIDDEN = 0.5
"""The share of tensor-parallel traffic that hides behind the matmuls that it feeds, which trainers split to do so. With
it plans of NVIDIA's runs of 70B and 405B are 3 to 12 % slow; without it 8 to 19 % (reproduce training-time)."""

UPDATE_BYTES = 28
"""Bytes read and written per parameter by a fused AdamW step in fp32: weight, gradient and two moments read, three of
them written."""


@dataclass(frozen=True)
class Efficiency:
    """The shares of the dense peak that work reaches, all elementwise work around it included.

    weights: matmuls with weights. attention: softmax attention by a flash kernel. recurrent: mixers with a recurrent
    state. measured_s: where mixers were measured, their training seconds per token on one device, which replace both.
    """

    weights: float
    attention: float
    recurrent: float
    measured_s: float | None = None


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest stage, by part; their sum is the step.

    weights_s, attention_s, recurrent_s, head_s: compute. recompute_s: of it what is computed again. traffic: exposed
    seconds by what they are for. bubble_s: waiting for other stages. update_s: the optimizer. passings: how layers
    share a sequence, where several devices have it. waiting_s: for devices whose documents are longer.
    """

    micro_batches: int
    weights_s: float
    attention_s: float
    recurrent_s: float
    head_s: float
    recompute_s: float
    traffic: tuple[tuple[str, float], ...]
    bubble_s: float
    update_s: float
    passings: tuple[Passing, ...]
    waiting_s: float = 0.0

    @property
    def compute_s(self) -> float:
        return self.weights_s + self.attention_s + self.recurrent_s + self.head_s + self.recompute_s

    @property
    def traffic_s(self) -> float:
        return sum(seconds for _, seconds in self.traffic)

    @property
    def seconds(self) -> float:
        return self.compute_s + self.traffic_s + self.bubble_s + self.update_s + self.waiting_s


@dataclass(frozen=True)
class Rates:
    """What the time of a step rests on: peak rates, the shares of them that are reached, and the links."""

    peak: Peak
    efficiency: Efficiency
    links: Links


def step_of(
    model: ModelLoad,
    stages: Sequence[StageLoad],
    degrees: Degrees,
    micro_batches: int,
    rates: Rates,
    passings: Sequence[tuple[Passing, ...]],
) -> StepTime:
    """Return the time of an optimizer step: that of the slowest stage for all micro-batches, and what others add.

    Weights are gathered for the layer ahead while a layer works, and gradients reduced behind it (FSDP), so that only
    what takes longer than the pass counts. A pipeline of p stages waits for p - 1 micro-batches (1F1B), and interleaved
    in v parts for (p - 1) / v (Narayanan et al. 2021, arXiv 2104.04473, section 2.2).

    passings: how the layers of each stage share a sequence; empty tuples where one device has all of it.
    """
    times = [
        _stage_time(model, stage, degrees, micro_batches, rates, passed)
        for stage, passed in zip(stages, passings, strict=True)
    ]
    return max(times, key=lambda time: time.seconds)


class _Work(NamedTuple):
    """Seconds of compute of one micro-batch in a stage: of a forward pass, and of both passes of the cross entropy."""

    weights: float
    attention: float
    recurrent: float
    head: float
    loss: float

    @property
    def layers(self) -> float:
        return self.weights + self.attention + self.recurrent


def _work(model: ModelLoad, load: StageLoad, degrees: Degrees, rates: Rates, passings: tuple[Passing, ...]) -> _Work:
    """Return the compute of a device of a stage: FLOPs at the shares of the peak, or mixers as they were measured."""
    efficiency, peak = rates.efficiency, float(rates.peak.flops_per_s)
    tokens = model.recipe.micro_batch * model.context / (degrees.cp * degrees.tp)
    weights = load.weight_flops * tokens / (peak * efficiency.weights)
    attention = load.attention_flops * tokens / (peak * efficiency.attention)
    recurrent = load.recurrent_flops * tokens / (peak * efficiency.recurrent)
    if efficiency.measured_s is not None:
        share = load.layers / model.spec.layer_count
        attention, recurrent = 0.0, efficiency.measured_s / TRAINING_PASSES * tokens * share
    recurrent += sum(way.exchange.again_flops for way in passings) * tokens / (peak * efficiency.recurrent)
    head = load.head_flops * tokens / (peak * efficiency.weights)
    logits = model.spec.vocab_size * tokens if load.last else 0.0
    return _Work(weights, attention, recurrent, head, LOSS_PASSES_BYTES * logits / float(rates.peak.bytes_per_s))


def _stage_time(
    model: ModelLoad,
    load: StageLoad,
    degrees: Degrees,
    micro_batches: int,
    rates: Rates,
    passings: tuple[Passing, ...],
) -> StepTime:
    """Return the time of a step if all stages were as slow as this one."""
    work, traffic = _work(model, load, degrees, rates, passings), traffic_of(model, load, degrees, rates.links)
    recomputes = model.recipe.recompute == "full"
    again, forwards = (work.layers, 2) if recomputes else (0.0, 1)
    forward = work.layers + work.head
    backward, behind = 2 * forward + again, traffic.gather_s + traffic.reduce_s
    exposed = {
        "weights": max(0.0, traffic.gather_s - forward),
        "gradients": max(0.0, behind - backward) if degrees.zero >= 2 else 0.0,
        "tensor parallel": (forwards + 1) * (1 - TENSOR_HIDDEN) * traffic.tensor_s,
        "sequence": sum((forwards + passing.backward_passes) * passing.exposed_s for passing in passings),
        "experts": (forwards + 1) * traffic.experts_s,
        "stages": 2 * traffic.stage_s * degrees.interleave if degrees.pp > 1 else 0.0,
    }
    # The last backward pass hides what is reduced once a step: FSDP2 and DDP add up replicas layer by layer behind it.
    once = {
        "weights": _first_layer(load, traffic.gather_s) + traffic.update_s,
        "gradients": max(0.0, behind + traffic.replicas_s - backward) - exposed["gradients"],
    }
    batch = forward + backward + work.loss + sum(exposed.values())
    updated = load.all_parameters / degrees.shards if degrees.zero else load.stored_parameters(degrees.ep)
    names = dict.fromkeys((*exposed, *once))
    return StepTime(
        micro_batches=micro_batches,
        weights_s=micro_batches * TRAINING_PASSES * work.weights,
        attention_s=micro_batches * TRAINING_PASSES * work.attention,
        recurrent_s=micro_batches * TRAINING_PASSES * work.recurrent,
        head_s=micro_batches * (TRAINING_PASSES * work.head + work.loss),
        recompute_s=micro_batches * again,
        traffic=tuple((name, micro_batches * exposed.get(name, 0.0) + once.get(name, 0.0)) for name in names),
        bubble_s=(degrees.pp - 1) * batch / degrees.interleave,
        update_s=UPDATE_BYTES * updated / degrees.tp / float(rates.peak.bytes_per_s),
        passings=passings,
    )


def _first_layer(load: StageLoad, gather_s: float) -> float:
    """Return the time until the first layer's weights are there, which nothing hides."""
    return gather_s / max(load.layers, 1)
