"""Hypothesis strategies for mixers, FFNs and whole specs, small enough to brute-force and odd enough to hurt."""

from __future__ import annotations

from typing import Any

import msgspec
from ffn_specs import memories, stems
from hypothesis import strategies as st
from long_context_specs import exponential_sparses, hyenas, memory_sparses, span_searches, wersas
from mixer_fields import head_fields, sizes, windows

from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.mixers import (
    DSA,
    GLA,
    GSA,
    KDA,
    MLA,
    MLSTM,
    NSA,
    RGLRU,
    RWKV4,
    RWKV7,
    Attention,
    ChunkedAttention,
    Compressed,
    DeltaNet,
    Forgetting,
    GatedDeltaNet,
    IndexedBlocks,
    Lightning,
    Linear,
    LogLinear,
    Mamba1,
    Mamba2,
    Mixer,
    MoBA,
    Power,
    RetNet,
    ShortConvolution,
    SparseStateExpansion,
)
from powerplan.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    ProportionalScaling,
    Rope,
    YarnScaling,
)
from powerplan.spec import Layer, LayerGroup, ModelSpec, Norm

names = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), min_size=1, max_size=20).filter(
    str.strip
)
contexts = st.integers(1, 700)


@st.composite
def attention_fields(draw: st.DrawFn) -> dict[str, Any]:
    fields = draw(head_fields()) | {"window": draw(windows), "sinks": draw(st.booleans())}
    if draw(st.integers(0, 4)) == 0:
        return fields | {draw(st.sampled_from(["shared_kv", "uncached"])): True}
    if draw(st.integers(0, 4)) == 0:
        return fields | {"keys_as_values": True, "v_head_dim": fields["head_dim"]}
    return fields


attentions = st.builds(lambda fields: Attention(**fields), attention_fields())
chunked_attentions = st.builds(
    lambda heads, window, sinks: ChunkedAttention(**heads, window=window, sinks=sinks),
    head_fields(),
    st.integers(1, 300),
    st.booleans(),
)
powers = st.builds(
    lambda heads, p, gated, normalize, chunk, tile: Power(
        **heads, p=p, gated=gated, normalize=normalize, chunk_size=chunk, tile=tile
    ),
    head_fields(),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    windows,
    st.integers(1, 16),
)
linears = st.builds(
    lambda heads, gated, chunk: Linear(**heads, gated=gated, chunk_size=chunk), head_fields(), st.booleans(), windows
)
mlas = st.builds(
    MLA,
    heads=st.integers(1, 12),
    q_lora_rank=st.none() | sizes,
    kv_lora_rank=sizes,
    qk_nope_head_dim=sizes,
    qk_rope_head_dim=sizes,
    v_head_dim=sizes,
    bias=st.booleans(),
    output_gate=st.sampled_from([False, True, "head"]),
)


@st.composite
def matrix_fields(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "heads": draw(st.integers(1, 6)),
        "head_dim": draw(st.integers(1, 24)),
        "v_head_dim": draw(st.integers(1, 24)),
        "output_gate": draw(st.booleans()),
        "output_norm": draw(st.sampled_from(["none", "head", "full"])),
        "conv_size": draw(st.integers(0, 5)),
        "conv_bias": draw(st.booleans()),
        "chunk_size": draw(st.integers(1, 90)),
    }


@st.composite
def delta_fields(draw: st.DrawFn) -> dict[str, Any]:
    fields = draw(matrix_fields())
    key_heads = draw(st.integers(1, 3))
    return fields | {"heads": key_heads * draw(st.integers(1, 3)), "key_heads": key_heads}


@st.composite
def mamba2_fields(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.integers(1, 3))
    return {
        "heads": groups * draw(st.integers(1, 3)),
        "groups": groups,
        "head_dim": draw(st.integers(1, 16)),
        "state_dim": draw(st.integers(1, 16)),
        "conv_size": draw(st.integers(0, 5)),
        "conv_bias": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "gated_norm": draw(st.booleans()),
        "chunk_size": draw(st.integers(1, 90)),
    }


retnets = st.builds(lambda fields: RetNet(**fields), matrix_fields())
lightnings = st.builds(lambda fields: Lightning(**fields), matrix_fields())
glas = st.builds(lambda fields, rank: GLA(**fields, gate_rank=rank), matrix_fields(), sizes)
deltanets = st.builds(lambda fields: DeltaNet(**fields), matrix_fields())
gated_deltanets = st.builds(lambda fields: GatedDeltaNet(**fields), delta_fields())
kdas = st.builds(
    lambda fields, rank, bias, full: KDA(**fields, gate_rank=rank, gate_bias=bias, full_rank=full),
    delta_fields(),
    sizes,
    st.booleans(),
    st.sampled_from(["none", "gate", "both"]),
)
mamba1s = st.builds(
    Mamba1,
    inner_size=sizes,
    dt_rank=sizes,
    state_dim=st.integers(1, 16),
    conv_size=st.integers(0, 5),
    conv_bias=st.booleans(),
    bias=st.booleans(),
    inner_norms=st.booleans(),
) | st.builds(
    lambda state, groups, heads, **fields: Mamba1(
        state_dim=state, shared_size=state * groups, inner_size=state * groups * heads, **fields
    ),
    st.integers(1, 16),
    st.integers(1, 3),
    st.integers(1, 4),
    dt_rank=sizes,
    conv_size=st.integers(0, 5),
    bias=st.booleans(),
)
mamba2s = st.builds(lambda fields: Mamba2(**fields), mamba2_fields())
log_linears = st.builds(lambda fields, levels: LogLinear(**fields, max_levels=levels), mamba2_fields(), sizes)
rwkv7s = st.builds(
    RWKV7,
    heads=st.integers(1, 6),
    head_dim=st.integers(1, 16),
    v_head_dim=st.integers(1, 16),
    decay_rank=sizes,
    rate_rank=sizes,
    gate_rank=sizes,
    value_rank=st.none() | sizes,
    channel_mix=st.booleans(),
    chunk_size=st.integers(1, 90),
)
gsas = st.builds(lambda fields, slots: GSA(**fields, slots=slots), matrix_fields(), st.integers(1, 24))
sses = st.builds(
    lambda fields, more, chosen, rank: SparseStateExpansion(
        **fields, partitions=chosen + more, top_k=chosen, gate_rank=rank
    ),
    matrix_fields(),
    st.integers(0, 4),
    st.integers(1, 3),
    sizes,
)
nsas = st.builds(
    lambda heads, block, stride, select, count, window: NSA(
        **heads, compress_size=block, compress_stride=stride, select_size=select, select_count=count, window=window
    ),
    head_fields(),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(1, 60),
)
mobas = st.builds(
    lambda heads, block, chosen, norm: MoBA(**heads, block_size=block, top_k=chosen, output_norm=norm),
    head_fields(),
    st.integers(1, 90),
    st.integers(1, 5),
    st.booleans(),
)
dsas = st.builds(
    DSA,
    heads=st.integers(1, 12),
    q_lora_rank=sizes,
    kv_lora_rank=sizes,
    qk_nope_head_dim=sizes,
    qk_rope_head_dim=sizes,
    v_head_dim=sizes,
    bias=st.booleans(),
    index_heads=sizes,
    index_head_dim=sizes,
    top_k=st.integers(1, 300),
)
short_convs = st.builds(ShortConvolution, inner_size=sizes, conv_size=st.integers(0, 5), bias=st.booleans())
mlstms = st.builds(lambda fields, bias: MLSTM(**fields, bias=bias), matrix_fields(), st.booleans())
rglrus = st.builds(RGLRU, heads=st.integers(1, 6), head_dim=st.integers(1, 24), conv_size=st.integers(0, 5))
rwkv4s = st.builds(RWKV4, inner_size=sizes, channel_mix=st.booleans())
indexed_blocks = st.builds(
    lambda heads, count, dim, block, chosen: IndexedBlocks(
        **heads, index_heads=count, index_head_dim=dim, block_size=block, top_k=chosen
    ),
    head_fields(),
    sizes,
    sizes,
    st.integers(1, 90),
    st.integers(1, 5),
)


@st.composite
def compressed_mixers(draw: st.DrawFn) -> Compressed:
    groups, rate = draw(st.integers(1, 4)), draw(st.none() | st.integers(1, 40))
    return Compressed(
        heads=groups * draw(st.integers(1, 4)),
        head_dim=draw(sizes),
        q_lora_rank=draw(sizes),
        output_groups=groups,
        output_rank=draw(sizes),
        window=draw(st.integers(1, 300)),
        compress_rate=rate,
        index_heads=None if rate is None else draw(st.none() | sizes),
        index_head_dim=draw(sizes),
        top_k=draw(st.integers(1, 30)),
        sinks=draw(st.booleans()),
    )


forgettings = st.builds(lambda heads, window: Forgetting(**heads, window=window), head_fields(), windows)
by_kind: dict[str, st.SearchStrategy[Mixer]] = {
    "attention": attentions,
    "mla": mlas,
    "power": powers,
    "linear": linears,
    "retnet": retnets,
    "lightning": lightnings,
    "gla": glas,
    "deltanet": deltanets,
    "gated_deltanet": gated_deltanets,
    "kda": kdas,
    "mamba1": mamba1s,
    "mamba2": mamba2s,
    "log_linear": log_linears,
    "rwkv7": rwkv7s,
    "gsa": gsas,
    "sse": sses,
    "nsa": nsas,
    "moba": mobas,
    "dsa": dsas,
    "forgetting": forgettings,
    "chunked_attention": chunked_attentions,
    "short_conv": short_convs,
    "mlstm": mlstms,
    "rglru": rglrus,
    "rwkv4": rwkv4s,
    "indexed_blocks": indexed_blocks,
    "compressed": compressed_mixers(),
    "hyena": hyenas,
    "exponential_sparse": exponential_sparses,
    "span_search": span_searches,
    "memory_sparse": memory_sparses,
    "wersa": wersas,
}
mixers = st.one_of(list(by_kind.values()))
mlps = st.builds(MLP, intermediate_size=sizes, gated=st.booleans(), bias=st.booleans())


@st.composite
def moes(draw: st.DrawFn) -> MoE:
    groups = draw(st.integers(1, 3))
    experts = groups * draw(st.integers(1, 4))
    shared = draw(st.integers(0, 32))
    chosen = draw(st.none() | st.integers(1, groups))
    return MoE(
        experts=experts,
        top_k=draw(st.integers(1, experts if chosen is None else experts // groups * chosen)),
        intermediate_size=draw(sizes),
        shared_intermediate_size=shared,
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        router_bias=draw(st.booleans()),
        shared_gate=shared > 0 and draw(st.booleans()),
        latent_size=draw(st.none() | sizes),
        zero_experts=draw(st.integers(0, 4)),
        groups=groups,
        top_groups=chosen,
    )


ffns = mlps | moes() | stems | memories()
extras = st.builds(Extra, name=names, vectors=st.integers(1, 9), elements=st.integers(0, 99), matmul=st.booleans())
more: dict[str, st.SearchStrategy[Any]] = {
    "extras": st.just(()) | st.lists(extras, max_size=2).map(tuple),
    "norms": st.none() | st.integers(0, 4),
    "tied": st.booleans(),
}
layers = st.one_of(
    st.builds(Layer, mixer=mixers, ffn=st.none() | ffns, **more),
    st.builds(Layer, mixer=st.none(), ffn=ffns, **more),
)
norms = st.builds(
    Norm,
    kind=st.sampled_from(["rmsnorm", "layernorm", "none"]),
    per_layer=st.integers(0, 4),
    final=st.booleans(),
    embedding=st.booleans(),
    bias=st.booleans(),
)


@st.composite
def groups(draw: st.DrawFn) -> LayerGroup:
    repeat = draw(st.integers(1, 5))
    if draw(st.booleans()):
        return LayerGroup(repeat=repeat, pattern=tuple(draw(st.lists(layers, min_size=1, max_size=3))))
    layer = draw(layers)
    return LayerGroup.of([layer], repeat)


context_lengths = st.integers(2, 2**40)
factors = st.one_of(st.integers(1, 64), st.floats(1, 1e6))
numbers = st.floats(1e-6, 1e6)
scalings = st.one_of(
    st.builds(LinearScaling, factor=factors),
    st.builds(DynamicScaling, factor=factors, original_context=context_lengths),
    st.builds(
        YarnScaling,
        factor=factors,
        original_context=context_lengths,
        attention_factor=st.none() | numbers,
        mscale=st.none() | numbers,
        truncate=st.booleans(),
    ),
    st.builds(Llama3Scaling, factor=factors, original_context=context_lengths),
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4).map(
        lambda pairs: LongRopeScaling(
            short_factor=tuple(short for short, _ in pairs),
            long_factor=tuple(long for _, long in pairs),
            original_context=4096,
            factor=8,
        )
    ),
    st.builds(ProportionalScaling, factor=factors),
)
ropes = st.builds(
    Rope,
    theta=st.floats(1, 1e9, exclude_min=True),
    partial=st.floats(0, 1, exclude_min=True),
    scaling=st.none() | scalings,
    in_layers=st.sampled_from([None, (), (0,)]),
)
specs = st.builds(
    ModelSpec,
    name=names,
    vocab_size=st.integers(1, 5000),
    hidden_size=sizes,
    tie_embeddings=st.booleans(),
    position_embeddings=st.none() | sizes,
    rope=st.none() | ropes | st.lists(ropes, max_size=3).map(tuple),
    trained_context=st.none() | context_lengths,
    norm=norms,
    layers=st.lists(groups(), min_size=1, max_size=3).map(tuple),
)


def untied(spec: ModelSpec) -> ModelSpec:
    """Return the spec with weights of its own in every layer."""
    return spec.map_layers(lambda layer: msgspec.structs.replace(layer, tied=False))


untied_specs = specs.map(untied)
