"""Random FFNs that look up: tables by tokens, and memories."""

from __future__ import annotations

from hypothesis import strategies as st

from powerplan.ffn import Memory, Stem

sizes = st.integers(1, 64)
stems = st.builds(Stem, intermediate_size=sizes, vocab_size=st.integers(5000, 6000), host=st.booleans())
"""The vocabularies of `specs` have 5,000 tokens at most."""


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    keys, heads, rank = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = min(heads, keys**2)
    neurons, projection = draw(st.booleans()), draw(st.booleans())
    return Memory(
        keys=keys,
        heads=heads,
        top_k=draw(st.integers(1, keys**2 // heads)),
        key_dim=draw(sizes),
        value_size=draw(st.none() | sizes) if projection else None,
        neurons=neurons,
        input_size=draw(st.none() | sizes) if neurons else None,
        value_projection=projection,
        gated=projection and draw(st.booleans()),
        shared_keys=draw(st.booleans()),
        rank=rank,
        rank_queries=rank > 1 and draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        host=draw(st.booleans()),
    )
