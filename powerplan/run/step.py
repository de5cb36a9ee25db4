"""How long a training step takes: compute at stated rates, traffic that nothing hides, bubbles, the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from powerplan.choices import Schedule
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

UPDATE_BYTES = 28
"""Bytes read and written per parameter by a fused AdamW step in fp32: weight, gradient and two moments read, three of
them written."""

FP8_SHARE = 0.5
"""The share of the dense fp8 peak: with it NVIDIA's fp8 runs of Llama 3 8B, 70B and 405B are planned 2 % fast, 10 %
slow and as published (reproduce training-time)."""

SENDING_SHARE = 20 / 132
"""The share of multiprocessors that send rows to experts with DualPipe, and compute nothing: 20 of an H800's 132
(DeepSeek-V3, arXiv 2412.19437, section 3.2.2)."""


@dataclass(frozen=True)
class Efficiency:
    """The shares of the dense peak that work reaches, all elementwise work around it included.

    weights: matmuls with weights. attention: softmax attention by a flash kernel. recurrent: mixers with a recurrent
    state. fp8: matmuls with weights whose operands are in fp8, of the dense fp8 peak.
    experts: matmuls of routed experts in bf16, with all that sorts tokens by experts; as `weights` where None. In fp8
    they are faster by as much as others.
    measured_s: where mixers were measured, their training seconds per token on one device, which replace both.
    """

    weights: float
    attention: float
    recurrent: float
    fp8: float = FP8_SHARE
    experts: float | None = None
    measured_s: float | None = None

    @property
    def expert_slowdown(self) -> float:
        """How many times as long a FLOP of routed experts takes as one of other weights."""
        return 1.0 if self.experts is None else self.weights / self.experts


@dataclass(frozen=True)
class Overlap:
    """The shares of traffic that hide behind the compute of a layer.

    tensor: of tensor parallelism, behind the matmuls that it feeds, which trainers split to do so. With a half plans of
    NVIDIA's runs of 70B and 405B are 3 to 12 % slow; with none 8 to 19 % (reproduce training-time).
    experts: of the rows that experts get and give back, behind other micro-batches; all of it with DualPipe and none
    without, where left out. No more hides than there is compute.
    """

    tensor: float = 0.5
    experts: float | None = None

    def of_experts(self, schedule: Schedule) -> float:
        """Return the share of the traffic of experts that hides with a schedule of the pipeline."""
        return float(schedule == "dualpipe") if self.experts is None else self.experts


DEFAULT_OVERLAP = Overlap()


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
    """What the time of a step rests on: peak rates, the shares of them that are reached, the links, what hides.

    fp8_flops_per_s: the dense fp8 peak; None where the device has none, or it is not known.
    """

    peak: Peak
    efficiency: Efficiency
    links: Links
    overlap: Overlap = DEFAULT_OVERLAP
    fp8_flops_per_s: float | None = None


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
    in v parts for (p - 1) / v (Narayanan et al. 2021, arXiv 2104.04473, section 2.2). With DualPipe it waits p/2 - 1
    times for a forward and a backward pass that overlap, and a backward pass, less three times the part of it that
    makes gradients of weights (DeepSeek-V3, arXiv 2412.19437, table 2).

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
    efficiency = rates.efficiency
    free = 1 - SENDING_SHARE if degrees.schedule == "dualpipe" and degrees.ep > 1 else 1.0
    peak = float(rates.peak.flops_per_s) * free
    tokens = model.recipe.micro_batch * model.context / (degrees.cp * degrees.tp)
    rate = fast = peak * efficiency.weights
    if model.recipe.matmuls_dtype is not None:
        assert rates.fp8_flops_per_s is not None, "refused where no rate is known"
        fast = rates.fp8_flops_per_s * free * efficiency.fp8
    linear = load.linear_flops + load.expert_flops * (efficiency.expert_slowdown - 1)
    weights = (load.weight_flops - load.linear_flops) * tokens / rate + linear * tokens / fast
    attention = load.attention_flops * tokens / (peak * efficiency.attention)
    recurrent = load.recurrent_flops * tokens / (peak * efficiency.recurrent)
    if efficiency.measured_s is not None:
        share = load.layers / model.spec.layer_count
        attention, recurrent = 0.0, efficiency.measured_s / TRAINING_PASSES * tokens * share
    recurrent += sum(way.exchange.again_flops for way in passings) * tokens / (peak * efficiency.recurrent)
    head = load.head_flops * tokens / rate
    logits = model.spec.vocab_size * tokens * load.losses if load.last else 0.0
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
    dual, share = degrees.schedule == "dualpipe", rates.overlap.of_experts(degrees.schedule)
    routed = (forwards + 1) * traffic.experts_s
    stages = 2 * traffic.stage_s * degrees.interleave if degrees.pp > 1 else 0.0
    # DualPipe hides what stages pass on with what experts get, as long as there is compute to hide both behind.
    beyond = max(0.0, routed + dual * stages - forward - backward)
    exposed = {
        "weights": max(0.0, traffic.gather_s - forward),
        "gradients": max(0.0, behind - backward) if degrees.zero >= 2 else 0.0,
        "tensor parallel": (forwards + 1) * (1 - rates.overlap.tensor) * traffic.tensor_s,
        "sequence": sum((forwards + passing.backward_passes) * passing.exposed_s for passing in passings),
        "experts": max((1 - share) * routed, beyond),
        "stages": 0.0 if dual else stages,
    }
    # The last backward pass hides what is reduced once a step: FSDP2 and DDP add up replicas layer by layer behind it.
    once = {
        "weights": _first_layer(load, traffic.gather_s) + traffic.update_s,
        "gradients": max(0.0, behind + traffic.replicas_s - backward) - exposed["gradients"],
    }
    batch = forward + backward + work.loss + sum(exposed.values())
    updated = load.all_parameters / degrees.shards if degrees.zero else load.stored_parameters(degrees.ep)
    names = dict.fromkeys((*exposed, *once))
    waits = (degrees.pp - 1) * batch / degrees.interleave
    if dual:
        waits = (degrees.pp / 2 - 1) * (batch + backward - 3 * (work.weights + work.head))
    return StepTime(
        micro_batches=micro_batches,
        weights_s=micro_batches * TRAINING_PASSES * work.weights,
        attention_s=micro_batches * TRAINING_PASSES * work.attention,
        recurrent_s=micro_batches * TRAINING_PASSES * work.recurrent,
        head_s=micro_batches * (TRAINING_PASSES * work.head + work.loss),
        recompute_s=micro_batches * again,
        traffic=tuple((name, micro_batches * exposed.get(name, 0.0) + once.get(name, 0.0)) for name in names),
        bubble_s=waits,
        update_s=UPDATE_BYTES * updated / degrees.tp / float(rates.peak.bytes_per_s),
        passings=passings,
    )


def _first_layer(load: StageLoad, gather_s: float) -> float:
    """Return the time until the first layer's weights are there, which nothing hides."""
    return gather_s / max(load.layers, 1)
