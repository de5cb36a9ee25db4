"""Sequence mixers, one class for each kind. docs/extending.md lists what belongs to a new kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import msgspec

from powerplan.errors import allowed_values
from powerplan.mixers.attention import Attention, ChunkedAttention, Forgetting
from powerplan.mixers.base import HeadShape, Inherited, Mixer
from powerplan.mixers.compressed import Compressed
from powerplan.mixers.convolution import ShortConvolution
from powerplan.mixers.delta import KDA, RWKV7, DeltaNet, GatedDeltaNet
from powerplan.mixers.exponential import ExponentialSparse
from powerplan.mixers.formulas import Convention
from powerplan.mixers.gated import MLSTM, RGLRU, RWKV4
from powerplan.mixers.heads import GroupedHeads
from powerplan.mixers.hyena import Hyena
from powerplan.mixers.linear import GLA, Lightning, RetNet
from powerplan.mixers.memory import MemorySparse
from powerplan.mixers.mla import MLA
from powerplan.mixers.power import FeatureAttention, Linear, Power
from powerplan.mixers.slots import GSA, SparseStateExpansion
from powerplan.mixers.spans import SpanSearch
from powerplan.mixers.sparse import DSA, NSA, IndexedBlocks, MoBA
from powerplan.mixers.ssm import LogLinear, Mamba1, Mamba2
from powerplan.mixers.wersa import Wersa

# The order is kept in the JSON schema, in --only of recommend, and where dims --kind lists equal states.
Features = Power | Linear
Matrices = RetNet | Lightning | GLA | DeltaNet | GatedDeltaNet | KDA
OtherStates = Mamba1 | Mamba2 | LogLinear | RWKV7 | GSA | SparseStateExpansion
Sparse = NSA | MoBA | DSA
Selective = IndexedBlocks | Compressed
Gated = ShortConvolution | MLSTM | RGLRU | RWKV4
LongContext = Hyena | ExponentialSparse | SpanSearch | MemorySparse | Wersa
AnyMixer = (
    Attention
    | MLA
    | Features
    | Matrices
    | OtherStates
    | Sparse
    | Forgetting
    | ChunkedAttention
    | Gated
    | Selective
    | LongContext
)

MIXERS: dict[str, type[Mixer]] = {str(mixer.__struct_config__.tag): mixer for mixer in get_args(AnyMixer)}
"""Every mixer class by its `kind`."""

PUBLISHED_AS = {
    "msa": "memory_sparse",
    "superlinear": "span_search",
    "hyenadna": "hyena",
    "fox": "forgetting",
    "gqa": "attention",
    "powerattention": "power (power attention) or exponential_sparse (PowerAttention)",
}
"""Kinds by names of papers that are spelt like another kind or like none; without case, - and _."""


def allowed_kinds(word: str, allowed: Sequence[str]) -> str:
    """Return the end of a message about a word that is no kind: what is meant where that is known, and all kinds."""
    meant = PUBLISHED_AS.get(word.casefold().replace("-", "").replace("_", ""))
    return f"; did you mean {meant}? allowed are {', '.join(allowed)}" if meant else allowed_values(word, allowed)


HEAD_FIELDS = frozenset(GroupedHeads.__struct_fields__)
"""Fields that belong to a layer's heads, and so to its weights."""

# msgspec.structs.fields would resolve the types of all fields: 20 ms of each cold start.
SIZED = frozenset(
    kind
    for kind, mixer in MIXERS.items()
    if ("head_dim", msgspec.NODEFAULT)
    in zip(mixer.__struct_fields__[::-1], mixer.__struct_defaults__[::-1], strict=False)
)
"""Kinds that need a head_dim; a spec may leave it out if hidden_size is a multiple of heads."""

__all__ = [
    "DSA",
    "GLA",
    "GSA",
    "HEAD_FIELDS",
    "KDA",
    "MIXERS",
    "MLA",
    "MLSTM",
    "NSA",
    "RGLRU",
    "RWKV4",
    "RWKV7",
    "SIZED",
    "AnyMixer",
    "Attention",
    "ChunkedAttention",
    "Compressed",
    "Convention",
    "DeltaNet",
    "ExponentialSparse",
    "FeatureAttention",
    "Forgetting",
    "GatedDeltaNet",
    "GroupedHeads",
    "HeadShape",
    "Hyena",
    "IndexedBlocks",
    "Inherited",
    "Lightning",
    "Linear",
    "LogLinear",
    "Mamba1",
    "Mamba2",
    "MemorySparse",
    "Mixer",
    "MoBA",
    "Power",
    "RetNet",
    "ShortConvolution",
    "SpanSearch",
    "SparseStateExpansion",
    "Wersa",
    "allowed_kinds",
]
