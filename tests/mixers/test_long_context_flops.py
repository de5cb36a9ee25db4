"""Hyena, static sparse attention, span search, memory sparse attention and WERSA: brute force and explicit counts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from long_context_specs import exponential_sparses, hyenas, memory_sparses, span_searches
from plain_mixers import Tally, fft, fft_convolution, linear_steps, long_convolution, modal_steps, with_ones
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from powerplan.errors import InputError
from powerplan.mixers import Attention, Convention, ExponentialSparse, Hyena, MemorySparse, Mixer, SpanSearch, Wersa
from powerplan.mixers.exponential import blocks_at_powers, mean_keys_at_powers
from powerplan.mixers.formulas import total
from powerplan.mixers.spans import ceil_root, sum_of_ceil_roots
from powerplan.units import MAX_CONTEXT

HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 5, "v_head_dim": 3}
TOKENS = 61
FULL, CHUNKED = Convention("full"), Convention(form="chunked")


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """[..., k] on [..., n, k] and [..., n, v]: softmax attention of one token."""
    return (query[..., None, :] @ keys.transpose(-1, -2)).softmax(-1) @ values


def caches(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [T, 4, 5], and keys and values of 4 heads, two of which share theirs: [4, T, 5], [4, T, 3]."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator) for shape in ((tokens, 4, 5), (2, tokens, 5), (2, tokens, 3)))
    return q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)


def flops(mixer: Mixer, tokens: int, convention: Convention | None = None) -> Fraction:
    return Fraction(total(mixer.state_flops_terms(tokens, convention or Convention()))) * tokens


# Static sparse attention: the pattern of algorithm 1 of the paper, entry by entry.


def pattern(tokens: int, block_size: int, window: int) -> torch.Tensor:
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    back = query // block_size - key // block_size
    seen = (back < window) | ((back & (back - 1)) == 0) | (key < block_size)
    return seen & (query >= key)


def test_exponential_sparse_token_by_token() -> None:
    mixer = ExponentialSparse(**HEADS, block_size=3, window_blocks=2)
    q, k, v = caches()
    mask = pattern(TOKENS, 3, 2)
    with FlopCounterMode(display=False) as counter:
        for token in range(TOKENS):
            attend(q[token], k[:, mask[token]], v[:, mask[token]])
    assert flops(mixer, TOKENS) == counter.get_total_flops()


def keys_at_powers(position: int, block_size: int, window: int) -> int:
    """Return the keys that query number `position`, from 1, sees: its own block up to itself, and whole blocks."""
    block, offset = divmod(position - 1, block_size)
    return offset + 1 + block_size * blocks_at_powers(block, window)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 12))
def test_exponential_sparse_sees_the_pattern(tokens: int, block_size: int, window: int) -> None:
    seen = pattern(tokens, block_size, window).sum(1)
    assert mean_keys_at_powers(tokens, "exact", block_size, window) == Fraction(int(seen.sum()), tokens)
    assert keys_at_powers(tokens, block_size, window) == int(seen[-1])
    whole = -(-tokens // block_size) * block_size
    blocks = int(pattern(whole, block_size, window)[-1].sum())
    assert mean_keys_at_powers(tokens, "full", block_size, window) == min(tokens, blocks)


@given(st.integers(2, MAX_CONTEXT), st.integers(1, 10**6), st.integers(1, 1000))
def test_exponential_sparse_at_any_context(tokens: int, block_size: int, window: int) -> None:
    """The sum over t tokens is that over t - 1 and what the last token sees; no mean ever falls."""
    mean, before = (mean_keys_at_powers(count, "exact", block_size, window) for count in (tokens, tokens - 1))
    assert mean * tokens - before * (tokens - 1) == keys_at_powers(tokens, block_size, window)
    last, one_less = (mean_keys_at_powers(count, "full", block_size, window) for count in (tokens, tokens - 1))
    assert mean >= before
    assert last >= max(one_less, mean)


def test_exponential_sparse_as_published() -> None:
    """Of 128 blocks of 256 a query sees 5 in the window, the first, and 4 at powers of two (section 4.1).

    That is 0.934 less than all pairs, where the paper has a sparsity ratio of 0.94.
    """
    assert blocks_at_powers(127, 5) + 1 == 5 + 1 + 4
    mean = mean_keys_at_powers(32_768, "exact", 256, 5)
    assert float(1 - mean / 32_768) == pytest.approx(0.934, abs=0.0005)
    reach = pattern(256, 1, 1)
    for layers in range(1, 8):  # Any distance below 2^layers has at most `layers` ones.
        through = torch.linalg.matrix_power(reach.double(), layers)[-1].flip(0) > 0
        assert through[: 2**layers].all()


# Span search: anchors, spans and their lengths, query by query.


def roots_up(factor: int, number: int) -> int:
    value = 0
    while value * value < factor * factor * number:
        value += 1
    return value


def brute_search(mixer: SpanSearch, number: int) -> tuple[list[int], int, int]:
    """Return the anchors of a query number from 1, as token indices, the longest span, and the tokens of the window."""
    window = (mixer.window_anchors + 1) ** 2 - 1
    anchors = [number - i * i for i in range(mixer.window_anchors + 1, number + 1) if i * i <= number]
    length = 1 + roots_up(mixer.backward, number) + roots_up(mixer.forward, number)
    return anchors, min(length, max(0, number - window)), min(number, window)


def test_span_search_token_by_token() -> None:
    mixer = SpanSearch(**HEADS, spans=2, backward=2, forward=1, window_anchors=2)
    q, k, v = caches()
    search = q.flip(0)
    with FlopCounterMode(display=False) as counter:
        for token in range(TOKENS):
            anchors, length, near = brute_search(mixer, token + 1)
            attend(q[token], k[:, token + 1 - near : token + 1], v[:, token + 1 - near : token + 1])
            if not anchors:
                continue
            scores = (search[token, :, None] @ k[:, anchors].transpose(1, 2))[:, 0]
            for best in scores.topk(min(2, len(anchors)), -1).indices.T:
                # Each head attends to a span of its own, moved to where it is whole.
                starts = (torch.tensor(anchors)[best] - length // 2).clamp(0, token + 1 - near - length)
                span = (starts[:, None] + torch.arange(length))[..., None]
                attend(q[token], k.gather(1, span.expand(4, length, 5)), v.gather(1, span.expand(4, length, 3)))
    assert flops(mixer, TOKENS) == counter.get_total_flops()


@given(span_searches, st.integers(1, 400))
def test_span_search_equals_an_explicit_count(mixer: SpanSearch, tokens: int) -> None:
    anchors = picked = near = 0
    for number in range(1, tokens + 1):
        own, length, window = brute_search(mixer, number)
        last = len(own), min(mixer.spans, len(own)) * length, window
        anchors, picked, near = anchors + last[0], picked + last[1], near + last[2]
    exact = mixer.flops_values(tokens, Convention())
    assert [exact[letter] * tokens for letter in ("anchors", "picked", "near")] == [anchors, picked, near]
    full = mixer.flops_values(tokens, FULL)
    assert (full["anchors"], full["picked"], full["near"]) == last


@given(span_searches, st.integers(2, MAX_CONTEXT))
def test_span_search_at_any_context(mixer: SpanSearch, tokens: int) -> None:
    assert flops(mixer, tokens) - flops(mixer, tokens - 1) == total(mixer.state_flops_terms(tokens, FULL))


@given(st.integers(0, 16), st.integers(0, 3000))
def test_sums_of_roots_equal_an_explicit_count(factor: int, count: int) -> None:
    assert sum_of_ceil_roots(factor, count) == sum(
        roots_up(factor, number) for number in range(1, min(count, 60) + 1)
    ) + sum(ceil_root(factor, number) for number in range(61, count + 1))


@given(st.integers(1, 16), st.integers(1, MAX_CONTEXT))
def test_roots_are_rounded_up_exactly(factor: int, number: int) -> None:
    value = ceil_root(factor, number)
    assert (value - 1) ** 2 < factor**2 * number <= value**2


@pytest.mark.parametrize("number", [2100, 4096, 99_999])
def test_span_search_excludes_no_token(number: int) -> None:
    """Anchors i and i + 1 are 2i + 1 tokens apart, and spans of 3 roots back and 1 on overlap."""
    mixer = SpanSearch(**HEADS)
    anchors, length, near = brute_search(mixer, number)
    back, on = roots_up(3, number), roots_up(1, number)
    assert length == back + on + 1 or number < 2300
    covered = {token for anchor in anchors for token in range(anchor - back, anchor + on + 1)}
    assert covered >= set(range(number - near))


def test_span_search_grows_with_the_root_of_the_context() -> None:
    mixer = SpanSearch(**HEADS, window_anchors=0)
    ratios = [flops(mixer, 4 * tokens) / flops(mixer, tokens) for tokens in (10**6, 10**9, 10**12)]
    assert ratios[0] < ratios[1] < ratios[2] < 8  # t^(3/2) in all, and roots are rounded up.
    assert float(ratios[2]) == pytest.approx(8, abs=1e-5)


def test_heads_that_share_keys_read_spans_of_their_own() -> None:
    mixer = SpanSearch(**HEADS, window_anchors=9)
    size = mixer.state_size(40_000)
    length = 1 + 3 * 200 + 200
    assert size.looked_up == 2 * 5 * (200 - 9) + 2 * 8 * (2 * 3 * length + 99)
    one = SpanSearch(**HEADS | {"kv_heads": 4}, window_anchors=9)
    assert one.state_size(40_000).looked_up == 4 * 5 * (200 - 9) + 4 * 8 * (3 * length + 99)
    assert mixer.state_size(200).looked_up == 2 * 5 * (14 - 9) + 2 * 8 * 200  # All tokens, read once.


# Memory sparse attention: documents, their means, and a question.


def documents_of(tokens: int, mixer: MemorySparse) -> list[range]:
    end = max(0, tokens - mixer.question_size)
    return [range(start, min(start + mixer.document_size, end)) for start in range(0, end, mixer.document_size)]


def test_memory_sparse_token_by_token() -> None:
    mixer = MemorySparse(**HEADS, top_k=3, pool_size=4, document_size=10, question_size=17)
    q, k, v = caches()
    documents = documents_of(TOKENS, mixer)
    chunks = [[document[start : start + 4] for start in range(0, len(document), 4)] for document in documents]
    assert [len(document) for document in documents] == [10, 10, 10, 10, 4]

    def means(x: torch.Tensor, spans: list[range]) -> torch.Tensor:
        return torch.stack([x[:, list(span)].mean(1) for span in spans], 1)

    every = [chunk for own in chunks for chunk in own]
    picked = [chunk for own in sorted(chunks, key=len)[-3:] for chunk in own]
    with FlopCounterMode(display=False) as counter:
        for document in documents:
            for token in document:
                attend(q[token], k[:, document[0] : token + 1], v[:, document[0] : token + 1])
        for token in range(44, TOKENS):
            q[token][:, None] @ means(k, every).transpose(1, 2)
            pooled = (torch.cat([means(x, picked), x[:, 44 : token + 1]], 1) for x in (k, v))
            attend(q[token], *pooled)
    assert flops(mixer, TOKENS) == counter.get_total_flops()


@given(memory_sparses, st.integers(1, 400))
def test_memory_sparse_equals_an_explicit_count(mixer: MemorySparse, tokens: int) -> None:
    documents = documents_of(tokens, mixer)
    pooled = sorted((-(-len(document) // mixer.pool_size) for document in documents), reverse=True)
    question = tokens - sum(map(len, documents))
    assert question == min(tokens, mixer.question_size)
    inside = sum(len(one) * (len(one) + 1) // 2 for one in [*documents, range(question)])
    picked, every = (sum(pooled[: mixer.top_k]), sum(pooled)) if mixer.routed else (0, 0)
    heads, width = mixer.heads, mixer.head_dim + mixer.v_head_dim
    routing = 2 * heads * mixer.head_dim * question * every
    assert flops(mixer, tokens) == 2 * heads * width * (inside + question * picked) + routing
    size, shared = mixer.state_size(tokens), mixer.kv_heads
    assert size.cache == shared * (width * question + (width + mixer.head_dim) * every)
    assert size.looked_up == shared * width * (question + picked)
    assert total(mixer.decode_flops_terms(tokens)) == 2 * heads * width * (question + picked)


def test_memory_of_100m_tokens_as_published() -> None:
    """Section 3.4.2: about 169 GB for 100M tokens, pools of 64, 8 heads of 128, 18 layers, bf16. It is 168.75 GiB."""
    mixer = MemorySparse(heads=32, kv_heads=8, head_dim=128, question_size=1, document_size=2**20)
    documents = mixer.state_size(100 * 2**20 + 1).cache - 8 * 256
    assert Fraction(18 * 2 * documents, 2**30) == Fraction(16_875, 100)


# Hyena: FFTs, the cached and the distilled form are one convolution.


def signals(channels: int = 4, tokens: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, taps = (torch.randn(channels, tokens, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, taps


@pytest.mark.parametrize("tokens", [1, 2, 32, 33, 37])
def test_hyena_by_fft_and_from_a_cache(tokens: int) -> None:
    x, taps = signals(tokens=tokens)
    tally = Tally()
    with FlopCounterMode(display=False) as counter:
        direct = long_convolution(x, taps)
    torch.testing.assert_close(fft_convolution(x, taps, tally), direct, rtol=1e-12, atol=1e-12)
    mixer = Hyena(inner_size=4)
    assert flops(mixer, tokens) == counter.get_total_flops()
    assert flops(mixer, tokens, CHUNKED) == tally.flops
    assert flops(Hyena(inner_size=4, order=4), tokens, CHUNKED) == 3 * tally.flops


def test_the_fft_is_an_fft() -> None:
    x = torch.complex(*signals(3, 64))
    tally = Tally()
    torch.testing.assert_close(fft(x, tally), torch.fft.fft(x))
    assert tally.flops == 3 * 5 * 64 * 6


def test_distilled_hyena_is_the_convolution_with_its_modes() -> None:
    generator = torch.Generator().manual_seed(2)
    angles, residues = (torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    poles = torch.polar(torch.full_like(angles, 0.9), angles)
    weights = torch.complex(residues, residues.flip(1))
    x, _ = signals()
    taps, tally = (weights[..., None] * poles[..., None] ** torch.arange(37)).real.sum(1), Tally()
    torch.testing.assert_close(modal_steps(x.T, poles, weights, tally).T, long_convolution(x, taps))
    assert flops(Hyena(inner_size=4, state_dim=6), 37) == tally.flops


@given(hyenas, st.integers(1, 2**30))
def test_hyena_keeps_inputs_or_a_state(mixer: Hyena, tokens: int) -> None:
    size, channels = mixer.state_size(tokens), mixer.inner_size * (mixer.order - 1)
    assert size.recent == max(0, mixer.conv_size - 1) * (mixer.order + 1) * mixer.inner_size
    if mixer.state_dim:
        assert (size.recurrent, size.cache, size.entry) == (channels * mixer.state_dim, 0, 0)
        assert not mixer.grows
    else:
        assert (size.recurrent, size.cache, size.entry) == (0, channels * tokens, channels)
        assert mixer.decode_bytes(tokens, Fraction(2)) == 2 * (channels * (tokens + 1) + 2 * size.recent)
    points = flops(mixer, tokens, CHUNKED) / channels
    bits = next(bits for bits in range(40) if 2**bits >= 2 * tokens)
    assert points == 2 * Fraction(5, 2) * 2**bits * bits + 6 * Fraction(2**bits, 2)


def parameters(*modules: nn.Module | nn.Parameter) -> int:
    weights = [weight for one in modules for weight in ([one] if isinstance(one, nn.Parameter) else one.parameters())]
    return sum(weight.numel() for weight in {id(weight): weight for weight in weights}.values())


@pytest.mark.parametrize(("hidden", "order", "table"), [(16, 2, None), (24, 3, 100)])
def test_hyena_has_the_parameters_of_its_modules(hidden: int, order: int, table: int | None) -> None:
    width, sine = 8, nn.Parameter(torch.ones(1, 8))
    network = [nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, width)]
    last = nn.Linear(width, (order - 1) * hidden, bias=False)
    projections = nn.Linear(hidden, (order + 1) * hidden), nn.Linear(hidden, hidden)
    short = nn.Conv1d((order + 1) * hidden, (order + 1) * hidden, 3, groups=(order + 1) * hidden)
    filters = [sine, nn.Parameter(torch.ones((order - 1) * hidden)), nn.Parameter(torch.ones(table or 0, 5))]
    mixer = Hyena(inner_size=hidden, order=order, filter_width=width, filter_length=table)
    counted = total(mixer.matmul_terms(hidden)) + total(mixer.other_terms(hidden))
    assert counted == parameters(*projections, short, *network, last, *filters)


def test_modes_are_pairs() -> None:
    with pytest.raises(InputError, match="state_dim: a mode has 2 numbers, and state_dim is 5"):
        Hyena(inner_size=4, state_dim=5)


# WERSA: linear attention on random features, of heads that share keys.


def test_wersa_with_shared_keys() -> None:
    mixer = Wersa(**HEADS, random_features=6)
    q, k, v = caches(20)
    tally, matrix = Tally(), torch.ones(5, 6)
    shared = (x[::2] for x in (k, v))
    with FlopCounterMode(display=False) as counter:
        queries = torch.relu(q.transpose(0, 1) @ matrix.expand(4, 5, 6))
        keys, values = (torch.relu(one @ matrix.expand(2, 5, 6)) if one.shape[2] == 5 else one for one in shared)
        state = torch.zeros(2, 6, 4)
        for token in range(20):
            state = state + keys[:, token, :, None] @ with_ones(values)[:, token, None]
            queries[:, token, None] @ state.repeat_interleave(2, 0)
    assert flops(mixer, 20) == counter.get_total_flops() + tally.flops
    assert mixer.state_size(20).recurrent == state.numel()


def test_wersa_is_linear_attention_on_its_features() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.rand(2, 9, size, generator=generator) for size in (5, 5, 3))
    whole = ((q @ k.transpose(1, 2)).tril() @ with_ones(v)).double()
    steps = linear_steps(q, k, with_ones(v), torch.ones(2, 9, 1), None).double()
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-5)


def test_wersa_has_the_parameters_of_its_modules() -> None:
    hidden, heads, levels = 32, 4, 3
    plain = [nn.Linear(hidden, hidden, bias=False) for _ in range(4)]
    pooler = nn.Conv1d(hidden, hidden, 33, groups=hidden)
    network = [nn.Linear(hidden, hidden // 4), nn.Linear(hidden // 4, levels + 1)]
    scales = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.ones(levels + 1))
    mixer = Wersa(heads=heads, head_dim=hidden // heads, wavelet_levels=levels)
    counted = total(mixer.matmul_terms(hidden)) + total(mixer.other_terms(hidden))
    assert counted == parameters(*plain, pooler, *network, *scales, nn.LayerNorm(hidden // heads))


def test_memory_sparse_and_span_search_have_the_parameters_of_their_modules() -> None:
    hidden, plain = 48, Attention(**HEADS)
    queries, keys = nn.Linear(48, 4 * 5, bias=False), nn.Linear(48, 2 * 5, bias=False)
    beside = {
        MemorySparse(**HEADS): parameters(queries, keys),
        MemorySparse(**HEADS, routed=False): 0,
        SpanSearch(**HEADS): parameters(queries),
        ExponentialSparse(**HEADS): 0,
    }
    for mixer, more in beside.items():
        assert total(mixer.matmul_terms(hidden)) == total(plain.matmul_terms(hidden)) + more
        assert total(mixer.other_terms(hidden)) == total(plain.other_terms(hidden))


@given(st.one_of(exponential_sparses, span_searches, memory_sparses), st.integers(1, 400))
def test_a_token_never_looks_up_more_than_there_is(mixer: Any, context: int) -> None:
    """Span search reads the keys of anchors a second time."""
    size = mixer.state_size(context)
    anchors = mixer.kv_heads * mixer.head_dim * mixer.anchors_at(context) if isinstance(mixer, SpanSearch) else 0
    assert 0 < size.looked_up <= size.cache + anchors
    assert mixer.decode_bytes(context, Fraction(2)) == 2 * (size.looked_up + size.entry)


@pytest.mark.parametrize("kind", [ExponentialSparse, SpanSearch, MemorySparse])
def test_short_contexts_are_attention(kind: type[Mixer]) -> None:
    """Within the window, or the question, every earlier key is met."""
    mixer, plain = kind(**HEADS), Attention(**HEADS)
    for context in (1, 7, 1024):
        assert total(mixer.state_flops_terms(context, Convention())) == total(
            plain.state_flops_terms(context, Convention())
        )
