"""Hypothesis strategies for Hyena, static sparse attention, span search, memory sparse attention and WERSA."""

from __future__ import annotations

from hypothesis import strategies as st
from mixer_fields import head_fields, sizes, windows

from powerplan.mixers import ExponentialSparse, Hyena, MemorySparse, SpanSearch, Wersa

hyenas = st.builds(
    Hyena,
    inner_size=sizes,
    order=st.integers(2, 4),
    conv_size=st.integers(0, 5),
    filter_width=sizes,
    filter_layers=st.integers(0, 3),
    position_features=st.integers(1, 9),
    filter_length=windows,
    state_dim=st.none() | st.integers(1, 16).map(lambda modes: 2 * modes),
    bias=st.booleans(),
)
exponential_sparses = st.builds(
    lambda heads, block, window: ExponentialSparse(**heads, block_size=block, window_blocks=window),
    head_fields(),
    st.integers(1, 90),
    st.integers(1, 20),
)
span_searches = st.builds(
    lambda heads, spans, back, on, anchors: SpanSearch(
        **heads, spans=spans, backward=back, forward=on, window_anchors=anchors
    ),
    head_fields(),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 4),
    st.integers(0, 9),
)
memory_sparses = st.builds(
    lambda heads, chosen, pool, document, question, routed: MemorySparse(
        **heads, top_k=chosen, pool_size=pool, document_size=document, question_size=question, routed=routed
    ),
    head_fields(),
    st.integers(1, 6),
    st.integers(1, 20),
    st.integers(1, 60),
    st.integers(1, 90),
    st.booleans(),
)
wersas = st.builds(
    lambda heads, features, levels, conv, chunk: Wersa(
        **heads, random_features=features, wavelet_levels=levels, conv_size=conv, chunk_size=chunk
    ),
    head_fields(),
    sizes,
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(1, 90),
)
