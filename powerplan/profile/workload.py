"""What is timed: one layer of a model, the mixers that take turns in it, and the passes and contexts of the runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from powerplan.dims import default_chunk_size
from powerplan.errors import printable
from powerplan.ffn import MLP, AnyFFN, MoE
from powerplan.measured import Direction
from powerplan.mixers import RWKV7, FeatureAttention, GroupedHeads, Mamba1, Mamba2, Mixer
from powerplan.mixers.base import HeadShape
from powerplan.mixers.formulas import total
from powerplan.mixers.linear import ChunkedState, MatrixState
from powerplan.profile.result import PASSES, LayerShape
from powerplan.spec import Layer, LayerGroup, ModelSpec


class Point(NamedTuple):
    """One point of measurement: a part of the layer, in one pass (a key of PASSES), at a context in tokens.

    Parts: "state" is the mixer alone, from queries, keys and values to its output; "projections" from the hidden state
    to the heads, and back; "ffn" the MLP or mixture of experts; "layer" all of these, with norms and residual sums.
    """

    part: str
    pass_name: str
    context: int

    @property
    def direction(self) -> Direction:
        """The pass as a saved profile names it."""
        return PASSES[self.pass_name]

    @property
    def trains(self) -> bool:
        return self.pass_name == "train"

    @property
    def decodes(self) -> bool:
        return self.pass_name == "decode"

    @property
    def tokens(self) -> int:
        """Tokens of each sequence that one run processes: one when decoding, else the whole context."""
        return 1 if self.decodes else self.context

    @property
    def forward_passes(self) -> int:
        """How many forward passes a run costs: the backward pass has twice the FLOPs of the forward pass."""
        return 3 if self.trains else 1

    def describe(self) -> str:
        return f"{self.part}, {self.direction}, {self.context:,} tokens"


@dataclass(frozen=True)
class TimedMixer:
    """A mixer, the name that its times are kept by, and what runs it.

    impl: one of IMPLS; "sdpa" or "flex" for softmax; "torch" or "fla" (flash-linear-attention) for recurrent kinds.
    """

    name: str
    mixer: Mixer
    impl: str

    @property
    def is_recurrent(self) -> bool:
        """Whether this is a kind with a recurrence of its own, and no queries, keys and values in groups."""
        return not isinstance(self.mixer, GroupedHeads)

    @property
    def shape(self) -> HeadShape:
        """The heads whose recurrence or attention is timed.

        In Mamba keys are B and C: N features, shared by the heads of a group; a channel of the first Mamba is a head.
        """
        mixer = self.mixer
        if isinstance(mixer, Mamba1):
            return HeadShape(mixer.inner_size, 1, mixer.state_dim, 1)
        if isinstance(mixer, Mamba2):
            return HeadShape(mixer.heads, mixer.groups, mixer.state_dim, mixer.head_dim)
        if isinstance(mixer, GroupedHeads):
            return HeadShape(mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.v_head_dim)
        assert isinstance(mixer, MatrixState | RWKV7)
        return HeadShape(mixer.heads, mixer.heads, mixer.head_dim, mixer.v_head_dim)

    @property
    def feature(self) -> FeatureAttention | None:
        """The mixer where it is power or linear attention, which powerplan.kernels runs; None for softmax attention."""
        return self.mixer if isinstance(self.mixer, FeatureAttention) else None

    @property
    def gated(self) -> bool:
        return self.feature is not None and self.feature.gated

    @property
    def text(self) -> str:
        """The mixer as `--mixer` takes it, without its heads."""
        family = self.mixer.family
        setting = {"window": f":{self.mixer.window_size}", "power": f":p={self.mixer.degree}"}
        return family + setting.get(family, "")

    @property
    def chunk_size(self) -> int | None:
        """Tokens per chunk that the implementation takes; None for an implementation without chunks."""
        if isinstance(self.mixer, ChunkedState):
            return self.mixer.chunk_size
        mixer = self.feature
        if mixer is None or self.impl not in ("torch", "triton"):
            return None
        return mixer.chunk_size or default_chunk_size(mixer.head_dim, mixer.degree, self.impl)

    def with_chunk_size(self, size: int) -> TimedMixer:
        """Return the same mixer with chunks of `size` tokens, under a name that says so."""
        mixer = msgspec.structs.replace(self.mixer, chunk_size=size)
        return TimedMixer(f"{self.name.removeprefix('power ')} chunk {size:,}", mixer, self.impl)

    @property
    def projection_key(self) -> tuple[Any, ...]:
        """All that the cost of the projections depends on: mixers with equal keys share one measurement of them.

        Those of a recurrent kind are its own, and not timed.
        """
        if self.is_recurrent:
            return (self.mixer,)
        fields = ("heads", "kv_heads", "head_dim", "v_head_dim", "bias", "qk_norm", "output_gate")
        return (*(getattr(self.mixer, field) for field in fields), self.gated)


@dataclass(frozen=True)
class Workload:
    """All that one profile times.

    Attributes:
        spec: The model.
        layer: The layer of the model that is built, with the model's own mixer.
        positions: Where the model has this layer, in words.
        subjects: Mixers that the profile is about. Crossovers and the breakdown are those of the first.
        baselines: Mixers that the subjects are compared with (`--against`).
        passes: Keys of PASSES, in their order.
        contexts: Tokens of each sequence, rising.
        device: "cpu", "cuda" or "cuda:1".
        dtype: "fp32", "bf16" or "fp16".
        batch: Sequences that a run processes at once.
        chunk_sizes: Further chunk sizes to time power attention with, in tokens.
        breakdown: Whether to show where the time of a run goes.
        notes: What the user should know about the choice of mixers.
        may_shorten: Whether the contexts may be shortened to fit the time limit, since the user gave none.
    """

    spec: ModelSpec
    layer: Layer
    positions: str
    subjects: tuple[TimedMixer, ...]
    baselines: tuple[TimedMixer, ...]
    passes: tuple[str, ...]
    contexts: tuple[int, ...]
    device: str
    dtype: str
    batch: int = 1
    chunk_sizes: tuple[int, ...] = ()
    breakdown: bool = False
    notes: tuple[str, ...] = ()
    may_shorten: bool = False

    @property
    def mixers(self) -> tuple[TimedMixer, ...]:
        return (*self.subjects, *self.baselines)

    @property
    def softmax(self) -> TimedMixer | None:
        """The baseline that is softmax attention over the whole context."""
        return next((timed for timed in self.baselines if timed.text == "attention"), None)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def ffn(self) -> AnyFFN | None:
        return self.layer.ffn

    def layer_shape(self) -> LayerShape:
        spec = self.spec
        text = None
        if self.ffn is not None:
            text = self.ffn.describe()
            if isinstance(self.ffn, MLP | MoE):
                text += f"{' experts of' * isinstance(self.ffn, MoE)} {self.ffn.intermediate_size:,}"
                text += ", gated" * self.ffn.gated
        rope = spec.rope_of(self.layer) is not None
        name = printable(spec.name)
        return LayerShape(model=name, positions=self.positions, hidden_size=spec.hidden_size, ffn=text, rope=rope)

    def ffn_weights(self, tokens: int | None = None) -> int:
        """Return the number of weights in the FFN's matrices; with `tokens`, the most that as many tokens can meet."""
        if self.ffn is None:
            return 0
        hidden = self.spec.hidden_size
        active, idle = int(total(self.ffn.matmul_terms(hidden))), int(total(self.ffn.idle_terms(hidden)))
        return active + idle if tokens is None else min(active + idle, active * tokens)

    def one_layer(self, mixer: Mixer) -> ModelSpec:
        """Return a model of this layer alone with `mixer` in it, and norms for the parts that it has."""
        norm = self.spec.norm
        if self.ffn is None and norm.per_layer > 2:
            norm = msgspec.structs.replace(norm, per_layer=2)
        group = LayerGroup(mixer=mixer, ffn=self.ffn)  # type: ignore[arg-type]
        rope = self.spec.rope_of(self.layer)
        setting = () if rope is None else msgspec.structs.replace(rope, in_layers=None)
        return msgspec.structs.replace(self.spec, layers=(group,), norm=norm, rope=setting)
