"""The layers of a model in pipeline stages, and what each stage asks of its devices in all."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from powerplan.ffn import FFN
from powerplan.run.exchanges import Exchange, exchanges_of
from powerplan.run.loads import LayerLoad, ModelLoad


@dataclass(frozen=True)
class StageLoad:
    """The sums over the layers of one pipeline stage, for one token where it is FLOPs or bytes of activations.

    They are floats from here on: thousands of ways to split a run are tried, and exact fractions would take 20 times as
    long. Sums of bytes and FLOPs stay below 2^53 or lose one part in 10^16.

    layers: how many, of a pair of stages the mean. parts: mixers and FFNs, between which tensor parallelism
    communicates.
    parameters: outside routed experts and `outer_parameters`. expert_parameters: of routed experts, in expert_layers.
    largest: parameters of its largest layer outside routed experts, and those of routed experts.
    linear_flops, expert_flops: those of weight_flops that fp8 matmuls take, and those in routed experts.
    kept_bytes, peak_bytes: as in LayerLoad; the sum of the first and the largest of the second.
    experts: the FFN of all its expert layers; None where there are none, or unlike ones.
    losses: the share of micro-batches whose loss a device of the stage computes, where `last` is set.
    outer_parameters: embedding and LM head where they are in this stage.
    """

    first: bool
    last: bool
    layers: float
    parts: float
    parameters: int
    expert_parameters: int
    matrix_parameters: int
    largest: tuple[int, int]
    outer_parameters: int
    weight_flops: float
    linear_flops: float
    expert_flops: float
    attention_flops: float
    recurrent_flops: float
    head_flops: float
    kept_bytes: float
    peak_bytes: float
    dispatched_bytes: float
    expert_layers: float
    exchanges: tuple[Exchange, ...]
    experts: FFN | None = None
    losses: float = 1.0

    @property
    def all_parameters(self) -> int:
        """Parameters of this stage, which the devices that see different tokens share."""
        return self.parameters + self.outer_parameters + self.expert_parameters

    def stored_parameters(self, experts_split: int) -> float:
        """Parameters of a device group that holds this stage, its routed experts split `experts_split` ways."""
        return self.parameters + self.outer_parameters + self.expert_parameters / experts_split


def stage_spans(layers: int, stages: int) -> list[range]:
    """Return the layers of each stage in order. Left-over layers go to the stages after the first, one each.

    The first stage has the embedding, and the last one the LM head.
    """
    whole, rest = divmod(layers, stages)
    counts = [whole + (1 <= stage <= rest) for stage in range(stages)]
    starts = [sum(counts[:stage]) for stage in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def stage_loads(model: ModelLoad, stages: int) -> list[StageLoad]:
    """Return what each of `stages` stages asks for."""
    counted = _counted(model, stage_spans(model.spec.layer_count, stages))
    return [_stage_load(model, part, number == 0, number == stages - 1) for number, part in enumerate(counted)]


def _counted(model: ModelLoad, spans: list[range]) -> list[list[tuple[LayerLoad, int]]]:
    """Return the kinds of layers of each stage, and how many it has of each, in one pass over unlike layers."""
    counts: list[Counter[int]] = [Counter() for _ in spans]
    starts = [span.start for span in spans]
    for kind, load in enumerate(model.layers):
        for positions in load.use.positions:
            if len(positions) < len(spans):
                for position in positions:
                    counts[bisect_right(starts, position) - 1][kind] += 1
            else:
                for count, span in zip(counts, spans, strict=True):
                    count[kind] += _below(positions, span.stop) - _below(positions, span.start)
    return [[(model.layers[kind], number) for kind, number in count.items() if number] for count in counts]


def _stage_load(model: ModelLoad, counted: list[tuple[LayerLoad, int]], first: bool, last: bool) -> StageLoad:
    outer = (model.embedding_parameters if first else 0) + (model.head_parameters if last else 0)
    if model.tied and last and not first:
        outer += model.spec.vocab_size * model.spec.hidden_size  # The last stage needs a copy of the embedding.
    experts = {load.use.layer.ffn for load, _ in counted if load.expert_parameters}
    return StageLoad(
        first=first,
        last=last,
        layers=sum(count for _, count in counted),
        parts=sum(load.parts * count for load, count in counted),
        parameters=sum(load.parameters * count for load, count in counted),
        expert_parameters=sum(load.expert_parameters * count for load, count in counted),
        matrix_parameters=sum(load.matrix_parameters * count for load, count in counted),
        largest=max(((load.parameters, load.expert_parameters) for load, _ in counted), key=sum, default=(0, 0)),
        outer_parameters=outer,
        weight_flops=sum(load.weight_flops * count for load, count in counted),
        linear_flops=sum(load.linear_flops * count for load, count in counted),
        expert_flops=sum(load.expert_flops * count for load, count in counted),
        attention_flops=_sum(load.state_flops * count for load, count in counted if load.entry_bytes),
        recurrent_flops=_sum(load.state_flops * count for load, count in counted if not load.entry_bytes),
        head_flops=model.head_flops if last else 0,
        kept_bytes=_sum(load.kept_bytes * count for load, count in counted),
        peak_bytes=float(max((load.peak_bytes for load, _ in counted), default=0)),
        dispatched_bytes=_sum(load.dispatched_bytes * count for load, count in counted),
        expert_layers=sum(count for load, count in counted if load.expert_parameters),
        exchanges=exchanges_of(counted, model.context),
        experts=experts.pop() if len(experts) == 1 else None,
    )


def stage_pairs(stages: Sequence[StageLoad]) -> list[StageLoad]:
    """Return what two stages ask of one device, the first with the last and so on, as DualPipe puts them together.

    A device holds the weights of both, and has half of the micro-batches in one and half in the other (DeepSeek-V3,
    arXiv 2412.19437, section 3.2.1): FLOPs and bytes of activations are means of the two, parameters are sums.
    """
    half = len(stages) // 2
    return [_pair(one, other) for one, other in zip(stages[:half], reversed(stages[half:]), strict=True)]


SUMS = ("parameters", "expert_parameters", "matrix_parameters", "outer_parameters")
"""What a device holds of both stages of a pair."""

MEANS = (
    *("layers", "parts", "weight_flops", "linear_flops", "expert_flops", "attention_flops", "recurrent_flops"),
    *("head_flops", "kept_bytes", "dispatched_bytes", "expert_layers"),
)
"""What a micro-batch takes of a pair of stages, as it passes one of them."""


def _pair(one: StageLoad, other: StageLoad) -> StageLoad:
    held = {name: getattr(one, name) + getattr(other, name) for name in SUMS}
    passed = {name: (getattr(one, name) + getattr(other, name)) / 2 for name in MEANS}
    experts = {stage.experts for stage in (one, other) if stage.expert_layers}
    return replace(
        one,
        **held,
        **passed,
        first=one.first or other.first,
        last=one.last or other.last,
        largest=max(one.largest, other.largest, key=sum),
        peak_bytes=max(one.peak_bytes, other.peak_bytes),
        experts=experts.pop() if len(experts) == 1 else None,
        losses=0.5,
    )


def _below(positions: range, stop: int) -> int:
    return len(range(positions.start, min(positions.stop, stop), positions.step))


def _sum(values: Iterable[Fraction]) -> float:
    return float(sum(values, Fraction(0)))
