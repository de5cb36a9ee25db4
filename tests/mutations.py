"""Random data for fuzzers: words, values and nested data, and mutations of good data and of its bytes."""

from __future__ import annotations

import copy
from typing import Any

from fuzzing import hostile
from hypothesis import strategies as st

from powerplan.swap.value import KINDS

words = st.text(max_size=12) | hostile | st.sampled_from([*KINDS, "mla", "mlp", "moe", "4k", "0k", "rmsnorm", "qkv"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | words
    | st.sampled_from([0, 1, 2, 10**9, 2**64, -(10**40)])
)


def nested(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    return st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5))


def spots(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in nested data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [spot for key, value in items for spot in ((*path, key), *spots(value, (*path, key)))]


@st.composite
def broken(draw: st.DrawFn, data: Any, values: st.SearchStrategy[Any], keys: list[str]) -> Any:
    """Nested data with one to three values replaced or removed, or keys renamed."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        every = spots(data)
        if not every:
            break
        *path, last = draw(st.sampled_from(every))
        parent = data
        for step in path:
            parent = parent[step]
        change = draw(st.sampled_from(["replace", "remove", "rename"]))
        if change == "replace":
            parent[last] = draw(values)
        elif change == "rename" and isinstance(parent, dict):
            parent[draw(words | st.sampled_from(keys))] = parent.pop(last)
        else:
            del parent[last]
    return data


@st.composite
def mutated(draw: st.DrawFn, text: str) -> bytes:
    """The bytes of a text with a few pieces overwritten, cut out or repeated."""
    raw = text.encode()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        stop = min(len(raw), start + draw(st.integers(0, 40)))
        piece = draw(
            st.binary(max_size=8) | st.sampled_from([raw[start:stop] * 2, b"*a", b"&a ", b"<<: ", b"!!x ", b"\t"])
        )
        raw = raw[:start] + piece + raw[stop:]
    return raw
