"""Hypothesis strategies for mixers, FFNs and whole specs, small enough to brute-force and odd enough to hurt."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from powerplan.ffn import MLP, MoE
from powerplan.mixers import MLA, Attention, Linear, Power
from powerplan.spec import Layer, LayerGroup, ModelSpec, Norm

sizes = st.integers(1, 64)
names = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs", "Zl", "Zp")), min_size=1, max_size=20).filter(
    str.strip
)
windows = st.none() | st.integers(1, 300)
contexts = st.integers(1, 700)


@st.composite
def head_fields(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 6))
    return {
        "heads": kv_heads * draw(st.integers(1, 6)),
        "kv_heads": kv_heads,
        "head_dim": draw(st.integers(1, 24)),
        "v_head_dim": draw(st.integers(1, 24)),
        "bias": draw(st.sampled_from([False, True, "qkv"])),
        "qk_norm": draw(st.sampled_from(["none", "head", "full"])),
        "output_gate": draw(st.booleans()),
    }


attentions = st.builds(
    lambda heads, window, sinks: Attention(**heads, window=window, sinks=sinks), head_fields(), windows, st.booleans()
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
)
mixers = st.one_of(attentions, powers, linears, mlas)
mlps = st.builds(MLP, intermediate_size=sizes, gated=st.booleans(), bias=st.booleans())


@st.composite
def moes(draw: st.DrawFn) -> MoE:
    experts = draw(st.integers(1, 12))
    shared = draw(st.integers(0, 32))
    return MoE(
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        intermediate_size=draw(sizes),
        shared_intermediate_size=shared,
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        router_bias=draw(st.booleans()),
        shared_gate=shared > 0 and draw(st.booleans()),
    )


layers = st.one_of(
    st.builds(Layer, mixer=mixers, ffn=st.none() | mlps | moes()),
    st.builds(Layer, mixer=st.none(), ffn=mlps | moes()),
)
norms = st.builds(
    Norm,
    kind=st.sampled_from(["rmsnorm", "layernorm", "none"]),
    per_layer=st.integers(0, 4),
    final=st.booleans(),
    bias=st.booleans(),
)


@st.composite
def groups(draw: st.DrawFn) -> LayerGroup:
    repeat = draw(st.integers(1, 5))
    if draw(st.booleans()):
        return LayerGroup(repeat=repeat, pattern=tuple(draw(st.lists(layers, min_size=1, max_size=3))))
    layer = draw(layers)
    return LayerGroup(repeat=repeat, mixer=layer.mixer, ffn=layer.ffn)


specs = st.builds(
    ModelSpec,
    name=names,
    vocab_size=st.integers(1, 5000),
    hidden_size=sizes,
    tie_embeddings=st.booleans(),
    position_embeddings=st.none() | sizes,
    norm=norms,
    layers=st.lists(groups(), min_size=1, max_size=3).map(tuple),
)
