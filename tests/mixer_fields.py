"""Hypothesis strategies for the fields that mixers share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

sizes = st.integers(1, 64)
windows = st.none() | st.integers(1, 300)


@st.composite
def head_fields(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 6))
    return {
        "heads": kv_heads * draw(st.integers(1, 6)),
        "kv_heads": kv_heads,
        "head_dim": draw(st.integers(1, 24)),
        "v_head_dim": draw(st.integers(1, 24)),
        "bias": draw(st.sampled_from([False, True, "qkv", "output"])),
        "qk_norm": draw(st.sampled_from(["none", "head", "full"])),
        "output_gate": draw(st.sampled_from([False, True, "head"])),
    }
