"""Compressed attention (DeepSeek-V4): FLOPs token by token, means by an explicit count."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from specs import compressed_mixers
from torch.utils.flop_counter import FlopCounterMode

from powerplan.errors import InputError
from powerplan.mixers import Attention, Compressed
from powerplan.mixers.compressed import mean_picked
from powerplan.mixers.formulas import Convention, total

TOKENS = 41
SIZES: dict[str, Any] = {
    "heads": 4,
    "head_dim": 6,
    "q_lora_rank": 8,
    "output_groups": 2,
    "output_rank": 5,
    "window": 7,
    "index_head_dim": 4,
    "top_k": 3,
}
FORMS: dict[str, dict[str, Any]] = {
    "window": {"compress_rate": None},
    "every entry": {"compress_rate": 5},
    "indexer": {"compress_rate": 3, "index_heads": 2},
}


def attend(query: torch.Tensor, keys: torch.Tensor) -> None:
    """[H, k] on [n, k]: softmax attention of one token to keys that are the values too."""
    (query @ keys.T).softmax(-1) @ keys


@pytest.mark.parametrize("form", FORMS)
def test_token_by_token(form: str) -> None:
    mixer = Compressed(**SIZES, **FORMS[form])
    query, features = torch.ones(4, 6), torch.ones(TOKENS, 6)
    with FlopCounterMode(display=False) as counter:
        for token in range(TOKENS):
            attend(query, features[max(0, token - 6) : token + 1])
            entries = (token + 1) // mixer.compress_rate if mixer.compress_rate else 0
            if mixer.index_heads and entries:
                torch.ones(2, 4) @ torch.ones(4, entries)
                entries = min(entries, 3)
            if entries:
                attend(query, features[:entries])
    assert total(mixer.state_flops_terms(TOKENS, Convention())) * TOKENS == counter.get_total_flops()


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 8))
def test_mean_picked_equals_an_explicit_count(tokens: int, block: int, count: int) -> None:
    seen = sum(min((token + 1) // block, count) for token in range(tokens))
    assert mean_picked(tokens, "exact", block, count) == Fraction(seen, tokens)
    assert mean_picked(tokens, "full", block, count) == min(tokens // block, count)


@given(compressed_mixers(), st.integers(1, 400))
def test_a_token_reads_its_window_and_entries(mixer: Compressed, context: int) -> None:
    size, key = mixer.state_size(context), mixer.head_dim
    near = min(context, mixer.window) * key
    if mixer.compress_rate is None:
        window = Attention(heads=1, head_dim=key, window=mixer.window).state_size(context)
        assert 2 * size.cache == 2 * size.looked_up == window.cache
        assert mixer.decode_bytes(context, Fraction(2)) == 2 * (near + key)
        return
    entries, series = context // mixer.compress_rate, 2 if mixer.index_heads else 1
    index = mixer.index_head_dim if mixer.index_heads else 0
    read = min(entries, mixer.top_k) if mixer.index_heads else entries
    assert size.looked_up == near + index * entries + key * read
    assert size.entry == key + -(-(key + index) // mixer.compress_rate)
    written, again = 2 * series * (key + index), 2 * (series - 1) * (key + index)
    assert mixer.decode_bytes(context, Fraction(2)) == 2 * (size.looked_up + size.entry + 2 * written + again)
    rest, overlap = context % mixer.compress_rate, again * mixer.compress_rate * min(1, entries)
    assert size.cache == near + (key + index) * entries + written * rest + overlap


def test_what_cannot_be() -> None:
    with pytest.raises(InputError, match="output_groups: output_groups 3 does not divide heads 4"):
        Compressed(**SIZES | {"output_groups": 3})
    with pytest.raises(InputError, match="index_heads: an indexer picks among compressed entries, and compress_rate"):
        Compressed(**SIZES, compress_rate=None, index_heads=2)
