"""What a device holds at the peak of a training step, by part.

Weights, gradients and optimizer states follow ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 5) and, where
weights are sharded, PyTorch's FSDP2: they are gathered layer by layer. Activations are split tp ways by tensor and
sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, equation 4), and cp ways along the sequence. Stage s of
p keeps those of p - s micro-batches (1F1B, Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1). Interleaved in v
parts, the first stage keeps 1 + (p - 1)/(p v) times as much (Korthikanti et al. 2022, section 4.2.3), and the others
less by 2/v of a micro-batch each (`in_flight`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from powerplan.run.degrees import Degrees
from powerplan.run.loads import ModelLoad
from powerplan.run.passing import Passing
from powerplan.run.recipe import LOSS_CHUNK, Recipe
from powerplan.run.stages import StageLoad

FRAMEWORK_BYTES = 2 * 2**30
"""What a process takes beside tensors: CUDA context, cuBLAS workspaces, NCCL buffers. An allowance, not measured."""

FRAGMENTATION = 0.05
"""The share of what comes and goes within a step that the allocator cannot use. An allowance, not a measurement."""

GATHERED_LAYERS = 2
"""Layers whose weights FSDP2 holds whole at once: the one at work and the next, which is gathered meanwhile."""

SPLIT_LOGIT_BYTES = 4
"""Bytes of a logit beside those of `loss_bytes` where the vocabulary is split over devices: the cross entropy of
torch.distributed.tensor.parallel.loss_parallel has one more fp32 tensor in its backward pass, 16 bytes a logit in all.
torch's allocator finds them (tests/run/test_split_loss.py)."""

BLOCK_OF_SCALES = 256
"""Parameters that share an fp32 scale in 8-bit optimizer states (Dettmers et al. 2021, arXiv 2110.02861: 2,048; the
libraries bitsandbytes and torchao take 256 today)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one device of a stage at its peak.

    weights: what is kept of them between steps. gathered: weights and gradients of whole layers, that exist while these
    work. activations: what the forward pass keeps for the backward pass. working: what exists beside that at the peak.
    allowance: framework and fragmentation. place: where the peak is.
    """

    stage: int
    weights: float
    gathered: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    allowance: float
    place: str

    @property
    def tensors(self) -> float:
        """The peak without the allowance."""
        return self.weights + self.gathered + self.gradients + self.optimizer + self.activations + self.working

    @property
    def peak(self) -> float:
        return self.tensors + self.allowance


def memory_of(
    model: ModelLoad,
    stages: Sequence[tuple[int, StageLoad]],
    degrees: Degrees,
    micro_batches: int,
    passings: Sequence[tuple[Passing, ...]] = (),
) -> Memory:
    """Return the memory of a device of the stage that needs most.

    Args:
        model: the model at its context, under its recipe.
        stages: its pipeline stages and their numbers, each with the layers it has.
        degrees: how the run is split.
        micro_batches: micro-batches of a step for each group of devices that shares sequences.
        passings: how the layers of each stage share a sequence, where several devices do.
    """
    received = [_received_bytes(passed) for passed in passings] or [0.0] * len(stages)
    held = [
        _stage_memory(model, stage, number, degrees, micro_batches, others)
        for (number, stage), others in zip(stages, received, strict=True)
    ]
    return max(held, key=lambda memory: memory.peak)


def _stage_memory(
    model: ModelLoad, load: StageLoad, stage: int, degrees: Degrees, micro_batches: int, received: float
) -> Memory:
    recipe, shards = model.recipe, degrees.shards
    zero = degrees.zero if shards > 1 else 0
    whole = load.stored_parameters(degrees.ep) / degrees.tp
    # Experts are split ep ways and sharded over the rest, so that a shard of them is 1 / (fsdp * cp) as of the others.
    shard = load.all_parameters / degrees.tp / shards
    weights = shard * float(recipe.master_bytes) if zero == 3 else whole * float(recipe.activation_bytes)
    gradients = (shard if zero >= 2 else whole) * float(recipe.gradient_bytes)
    states = _state_bytes(load, shard if zero >= 1 else whole, recipe, copied=zero < 3)
    tokens = recipe.micro_batch * model.context / degrees.cp
    waiting = in_flight(degrees, stage, micro_batches)
    before, behind = model.ends_bytes
    # The last stage is through with a loss before it begins with the next.
    ends = before * waiting * load.first + behind * load.last
    kept = (load.kept_bytes * waiting + ends) * tokens / degrees.tp
    moments = _at_layers(model, load, degrees, zero, tokens, received)
    if load.last:
        moments.append(_at_the_loss(model, load, degrees, zero, tokens))
    worst = max(moments, key=lambda moment: moment.gathered + moment.working)
    allowance = FRAMEWORK_BYTES + FRAGMENTATION * (kept + worst.working + worst.gathered)
    return Memory(stage, weights, worst.gathered, gradients, states, kept, worst.working, allowance, worst.place)


def in_flight(degrees: Degrees, stage: int, micro_batches: int) -> float:
    """Return of how many micro-batches a pipeline stage keeps the activations of its layers at most.

    Interleaved, it counts parts of stages: Megatron-LM runs 2 (p - s - 1) + (v - 1) p of them ahead (megatron/core/
    pipeline_parallel/schedules.py), and one more has just run when the first backward pass begins. With DualPipe the
    two stages of a device keep those of pp + 1 together (DeepSeek-V3, arXiv 2412.19437, table 2).
    """
    if degrees.schedule == "dualpipe":
        return min(micro_batches, degrees.pp + 1)
    if degrees.interleave == 1:
        return min(micro_batches, degrees.pp - stage)
    ahead = 2 * (degrees.pp - stage - 1) + (degrees.interleave - 1) * degrees.pp
    return min(micro_batches, (ahead + 1) / degrees.interleave)


class _Moment(NamedTuple):
    """What exists beside all that is kept, at one moment of a step."""

    gathered: float
    working: float
    place: str


def _at_layers(
    model: ModelLoad, load: StageLoad, degrees: Degrees, zero: int, tokens: float, received: float
) -> list[_Moment]:
    """Return the backward passes of the last layer, and of the one before it.

    The weights of the layer at work are whole, and those of the next one. In the first pass there are no gradients of
    weights yet. In the second those of two layers are whole, and what the last layer kept is gone.
    """
    recipe = model.recipe
    dense, experts = load.largest
    layers = GATHERED_LAYERS * (dense + experts / degrees.ep) / degrees.tp * float(recipe.activation_bytes)
    weights = layers + _root(load, recipe, degrees) if zero == 3 else 0.0
    gradients = layers if zero >= 2 else 0.0
    working = load.peak_bytes * tokens / degrees.tp + received
    if degrees.tp > 1:  # The input of the part at work, gathered again, and its gradient before it is scattered.
        working += 2 * _stream(model, tokens)
    gone = load.kept_bytes / max(load.layers, 1) * tokens / degrees.tp
    place = "the backward pass of a layer"
    return [_Moment(weights, working, place), _Moment(weights + gradients, max(0.0, working - gone), place)]


def _at_the_loss(model: ModelLoad, load: StageLoad, degrees: Degrees, zero: int, tokens: float) -> _Moment:
    """Return the cross entropy: logits, and no layer's weights but those of embedding and LM head."""
    held, peak = model.loss_bytes
    at_once = min(tokens, LOSS_CHUNK) if model.recipe.loss == "chunked" else tokens
    gathered = _root(load, model.recipe, degrees) if zero == 3 else 0.0
    working = (held * tokens + peak * at_once) / degrees.tp
    if degrees.tp > 1:  # The LM head's input, and one more tensor of a device's logits.
        working += _stream(model, at_once) + SPLIT_LOGIT_BYTES * model.spec.vocab_size * at_once / degrees.tp
    return _Moment(gathered, working, "the loss")


def _stream(model: ModelLoad, tokens: float) -> float:
    """Return the bytes of so many tokens on the residual stream, of which a device keeps a part between its matmuls.

    Devices that split the matmuls need all of it (Korthikanti et al. 2022, section 4.2.2).
    """
    return tokens * model.spec.hidden_size * float(model.recipe.activation_bytes)


def _root(load: StageLoad, recipe: Recipe, degrees: Degrees) -> float:
    """Return the bytes of embedding and LM head, which FSDP2's root module keeps gathered between its two passes."""
    return load.outer_parameters / degrees.tp * float(recipe.activation_bytes)


def _state_bytes(load: StageLoad, parameters: float, recipe: Recipe, *, copied: bool) -> float:
    """Return the bytes of the optimizer states of so many parameters.

    copied: whether the weights in fp32 are a copy, beside those that are multiplied with.
    """
    moment = float(recipe.moment_bytes)
    if recipe.optimizer == "adamw-8bit":
        moments = parameters * (2 + 2 * 4 / BLOCK_OF_SCALES)
    elif recipe.optimizer == "muon":
        matrices = load.matrix_parameters / load.all_parameters if load.all_parameters else 0.0
        moments = parameters * (2 - matrices) * moment
    else:
        moments = 2 * parameters * moment
    has_copy = copied and recipe.master == "fp32" and recipe.dtype != "fp32"
    return moments + (parameters * float(recipe.master_bytes) if has_copy else 0)


def _received_bytes(passings: Sequence[Passing]) -> float:
    """Return the bytes that a layer holds of other parts of a sequence at once, where that is most.

    They count beside the worst part of the layer, also where that is the FFN.
    """
    return max((way.buffer_bytes for way in passings), default=0.0)
