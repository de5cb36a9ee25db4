"""Sparse attention against plain implementations that attend to what a query picks, and against explicit counts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from specs import dsas, forgettings, indexed_blocks, mobas, nsas
from torch.utils.flop_counter import FlopCounterMode

from powerplan.mixers import DSA, MLA, NSA, Attention, Forgetting, IndexedBlocks, MoBA
from powerplan.mixers.formulas import Convention, total
from powerplan.mixers.sparse import mean_blocks, mean_earlier_blocks

TOKENS = 41
HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 5, "v_head_dim": 3}


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[G, H/G, k] on [G, n, k] and [G, n, v]: softmax attention of one token."""
    return (query @ keys.transpose(1, 2)).softmax(-1) @ values


def picked_blocks(count: int, size: int, token: int) -> list[int]:
    """Return the tokens of the `count` latest blocks up to `token`, its own whole block where there is one."""
    return list(range(token + 1))[-min(token + 1, count * size) :]


def caches() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, 2, 2, 5), (2, TOKENS, 5), (2, TOKENS, 3))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


def test_nsa_token_by_token() -> None:
    mixer = NSA(**HEADS, compress_size=6, compress_stride=4, select_size=5, select_count=3, window=7)
    q, k, v = caches()
    with FlopCounterMode(display=False) as counter:
        for token in range(TOKENS):
            starts = [start for start in range(0, token + 1, 4) if start + 6 <= token + 1]
            if starts:
                compressed = (torch.stack([x[:, start : start + 6].mean(1) for start in starts], 1) for x in (k, v))
                attend(q[token], *compressed)
            near = slice(max(0, token - 6), token + 1)
            picked = picked_blocks(3, 5, token)
            attend(q[token], k[:, picked], v[:, picked])
            attend(q[token], k[:, near], v[:, near])
    assert total(mixer.state_flops_terms(TOKENS, Convention())) * TOKENS == counter.get_total_flops()


def test_moba_token_by_token() -> None:
    mixer = MoBA(**HEADS, block_size=6, top_k=3)
    q, k, v = caches()
    with FlopCounterMode(display=False) as counter:
        for token in range(TOKENS):
            earlier = token // 6
            if earlier:
                means = torch.stack([k[:, 6 * block : 6 * block + 6].mean(1) for block in range(earlier)], 1)
                q[token] @ means.transpose(1, 2)
            picked = picked_blocks(3, 6, token)
            attend(q[token], k[:, picked], v[:, picked])
    assert total(mixer.state_flops_terms(TOKENS, Convention())) * TOKENS == counter.get_total_flops()


def test_dsa_token_by_token() -> None:
    mixer = DSA(
        heads=4,
        q_lora_rank=6,
        kv_lora_rank=8,
        qk_nope_head_dim=3,
        qk_rope_head_dim=2,
        v_head_dim=3,
        index_heads=2,
        index_head_dim=4,
        top_k=9,
    )
    with FlopCounterMode(display=False) as counter:
        for token in range(TOKENS):
            scores = torch.ones(2, 4) @ torch.ones(4, token + 1)
            top = scores.sum(0).topk(min(9, token + 1)).indices
            latents = torch.ones(token + 1, 8 + 2)[top]  # the key is the latent and a RoPE key, the value the latent
            (torch.ones(4, 8 + 2) @ latents.T).softmax(-1) @ latents[:, :8]
    assert total(mixer.state_flops_terms(TOKENS, Convention())) * TOKENS == counter.get_total_flops()


def test_indexed_blocks_token_by_token() -> None:
    mixer = IndexedBlocks(**HEADS, index_heads=2, index_head_dim=4, block_size=5, top_k=3)
    q, k, v = caches()
    with FlopCounterMode(display=False) as counter:
        for token in range(TOKENS):
            torch.ones(2, 4) @ torch.ones(4, token + 1)
            picked = picked_blocks(3, 5, token)
            attend(q[token], k[:, picked], v[:, picked])
    assert total(mixer.state_flops_terms(TOKENS, Convention())) * TOKENS == counter.get_total_flops()


@given(indexed_blocks, st.integers(1, 400))
def test_indexed_blocks_are_attention_and_an_indexer(mixer: Any, context: int) -> None:
    plain = Attention(**{name: getattr(mixer, name) for name in Attention.__struct_fields__ if hasattr(mixer, name)})
    heads, dim = mixer.index_heads, mixer.index_head_dim
    assert total(mixer.matmul_terms(16)) == total(plain.matmul_terms(16)) + 16 * (heads + 1) * dim
    assert total(mixer.other_terms(16)) == total(plain.other_terms(16)) + 2 * dim
    size, keys = mixer.state_size(context), mixer.kv_heads * (mixer.head_dim + mixer.v_head_dim)
    assert (size.cache, size.entry) == ((keys + dim) * context, keys + dim)
    assert size.looked_up == dim * context + keys * min(context, mixer.top_k * mixer.block_size)


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 20))
def test_mean_blocks_equal_an_explicit_count(tokens: int, block: int, stride: int) -> None:
    ends = [start + block for start in range(0, tokens, stride) if start + block <= tokens]
    seen = sum(end <= token + 1 for token in range(tokens) for end in ends)
    assert mean_blocks(tokens, "exact", block, stride) == Fraction(seen, tokens)
    assert mean_blocks(tokens, "full", block, stride) == len(ends)


@given(st.integers(1, 90), st.integers(1, 20))
def test_mean_earlier_blocks_equal_an_explicit_count(tokens: int, block: int) -> None:
    seen = sum(token // block for token in range(tokens))
    assert mean_earlier_blocks(tokens, "exact", block) == Fraction(seen, tokens)
    assert mean_earlier_blocks(tokens, "full", block) == (tokens - 1) // block


@pytest.mark.parametrize(("count", "size"), [(1, 7), (3, 5), (16, 64)])
def test_own_block_counted_whole_is_less_than_a_block_more(count: int, size: int) -> None:
    """The convention counts min(i, count x size) keys; with the own block as full as it is, there are these."""
    for seen in range(1, 2 * count * size + size):
        counted = min(seen, count * size)
        whole, own = divmod(seen - 1, size)
        exact = (min(whole, count - 1)) * size + own + 1
        assert 0 <= counted - exact < size
        assert counted == exact or seen > count * size


@given(st.one_of(nsas, mobas, dsas, indexed_blocks), st.integers(1, 400))
def test_a_token_never_looks_up_more_than_there_is_three_times(mixer: Any, context: int) -> None:
    """NSA's branches read the same keys; all else reads a part of the cache."""
    size = mixer.state_size(context)
    assert 0 < size.looked_up <= (3 if isinstance(mixer, NSA) else 1) * size.cache
    assert mixer.decode_bytes(context, Fraction(2)) == 2 * (size.looked_up + size.entry)


@given(mobas, st.integers(1, 400))
def test_moba_over_all_blocks_is_attention_and_a_choice(mixer: Any, context: int) -> None:
    whole = MoBA(**{name: getattr(mixer, name) for name in HEADS}, block_size=mixer.block_size, top_k=400)
    plain = Attention(**{name: getattr(mixer, name) for name in HEADS})
    _, attended = whole.state_flops_terms(context, Convention())
    assert attended.value == total(plain.state_flops_terms(context, Convention()))


@given(dsas, st.integers(1, 400))
def test_dsa_over_all_keys_is_absorbed_mla_and_an_indexer(mixer: Any, context: int) -> None:
    heads = {name: getattr(mixer, name) for name in MLA.__struct_fields__}
    mla = MLA(**heads)
    index = mixer.index_heads * mixer.index_head_dim
    extra = mixer.q_lora_rank * index + 16 * (mixer.index_head_dim + mixer.index_heads)
    assert total(mixer.matmul_terms(16)) == total(mla.matmul_terms(16)) + extra
    assert total(mixer.other_terms(16)) == total(mla.other_terms(16)) + 2 * mixer.index_head_dim
    assert mixer.state_size(context).cache == mla.state_size(context).cache + mixer.index_head_dim * context
    if context <= mixer.top_k:
        indexer, attention = mixer.state_flops_terms(context, Convention())
        assert indexer.value == index * (context + 1)
        assert attention.value == mixer.heads * (2 * mixer.kv_lora_rank + mixer.qk_rope_head_dim) * (context + 1)


@given(dsas, st.integers(1, 400))
def test_dsa_with_the_keys_of_an_earlier_layer_has_no_indexer(mixer: Any, context: int) -> None:
    shared = msgspec.structs.replace(mixer, shared_index=True)
    mla = MLA(**{name: getattr(mixer, name) for name in MLA.__struct_fields__})
    assert total(shared.matmul_terms(16)) == total(mla.matmul_terms(16))
    assert total(shared.other_terms(16)) == total(mla.other_terms(16))
    latents, picked = mla.kv_lora_rank + mla.qk_rope_head_dim, min(context, mixer.top_k)
    size = shared.state_size(context)
    assert (size.cache, size.entry, size.looked_up) == (latents * context, latents, latents * picked)
    _, attention = mixer.state_flops_terms(context, Convention())
    assert total(shared.state_flops_terms(context, Convention())) == attention.value


@given(forgettings, st.integers(1, 400))
def test_forgetting_is_attention_with_a_gate(mixer: Any, context: int) -> None:
    fields = {name: getattr(mixer, name) for name in Forgetting.__struct_fields__}
    plain = Attention(**fields)
    assert total(mixer.state_flops_terms(context, Convention())) == total(
        plain.state_flops_terms(context, Convention())
    )
    assert total(mixer.matmul_terms(16)) - total(plain.matmul_terms(16)) == 16 * mixer.heads
    kept = plain.kept(context)
    assert mixer.state_size(context).cache - plain.state_size(context).cache == mixer.heads * kept
