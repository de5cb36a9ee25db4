"""The longest context within a limit, where FLOPs fall now and then: attention in chunks, against every context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from powerplan.accounting import Accounting
from powerplan.caches.policy import Policy
from powerplan.cli import main
from powerplan.load import catalogue_spec
from powerplan.longest import last_at_most_in_periods
from powerplan.mixers import Attention, ChunkedAttention, Convention, MemorySparse, Power
from powerplan.mixers.formulas import least_keys_in_chunks, mean_keys_in_chunks, total
from powerplan.serving import Serving
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.swap import with_mixer
from powerplan.units import MAX_CONTEXT

HEADS: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 3}
PER_KEY = 2 * 2 * (3 + 3)
POWER = Power(**HEADS, p=2)
LAST = 400
causals = st.sampled_from(["exact", "full"])


def spec_of(mixers: Sequence[Attention | Power]) -> ModelSpec:
    layers = tuple(LayerGroup(mixer=mixer) for mixer in mixers)
    return ModelSpec(name="x", vocab_size=97, hidden_size=8, layers=layers)


def keys_of_all(mixer: Attention, context: int, causal: str) -> list[int]:
    """Return the keys that all queries of 1, 2 ... `context` tokens meet in sum."""
    if isinstance(mixer, ChunkedAttention):
        c = mixer.restarts_after
        if causal == "exact":
            return list(accumulate((place % c + 1 for place in range(context)), int.__add__))
        return [tokens // c * c * c + (tokens % c) ** 2 for tokens in range(1, context + 1)]
    seen = [min(tokens, mixer.window or tokens) for tokens in range(1, context + 1)]
    if causal == "exact":
        return list(accumulate(seen))
    return [tokens * keys for tokens, keys in enumerate(seen, 1)]


def state_flops(mixers: Sequence[Attention | Power], causal: str) -> list[Fraction]:
    """Return the state FLOPs per token at 1 to LAST tokens, counted without the formulas of means."""
    constant = sum(2 * 9 * 4 + 2 * 2 * 9 * 4 for mixer in mixers if isinstance(mixer, Power)) * Fraction(6, 9)
    summed = [keys_of_all(mixer, LAST, causal) for mixer in mixers if isinstance(mixer, Attention)]
    keys = [sum(of_mixers) for of_mixers in zip(*summed, strict=True)] or [0] * LAST
    return [constant + Fraction(PER_KEY * number, tokens) for tokens, number in enumerate(keys, 1)]


def least_beyond(mixers: Sequence[Attention | Power], causal: str) -> Fraction:
    """Return a number that the state FLOPs of more than LAST tokens are not below.

    A chunk that is not whole takes at most c^2/4 from the keys that all queries would meet in whole ones.
    """
    least = state_flops([mixer for mixer in mixers if not isinstance(mixer, ChunkedAttention)], causal)[-1]
    for mixer in mixers:
        if isinstance(mixer, ChunkedAttention):
            c = mixer.restarts_after
            keys = Fraction(c) if causal == "full" else Fraction(c + 1, 2)
            least += PER_KEY * (keys - Fraction(c * c, (4 if causal == "full" else 8) * LAST))
    return least


windowed = st.builds(lambda window: Attention(**HEADS, window=window), st.integers(1, 90))
chunked = st.builds(lambda window: ChunkedAttention(**HEADS, window=window), st.integers(1, 60))
mixes = st.lists(st.one_of(windowed, chunked, chunked, st.just(Attention(**HEADS)), st.just(POWER)), max_size=5)


@settings(deadline=None, max_examples=150)
@given(mixes, chunked, causals, st.integers(1, LAST), st.integers(-1, 1), st.sampled_from(["recurrent", "chunked"]))
def test_no_longer_context_is_within_the_limit(
    others: list[Attention | Power], one: ChunkedAttention, causal: Any, near: int, off: int, form: Any
) -> None:
    mixers = [one, *others]
    assume(form == "recurrent" or POWER not in mixers)
    accounting = Accounting(spec_of(mixers), Convention(causal, form))
    flops = state_flops(mixers, causal)
    assert accounting.state_flops_per_token(near) == flops[near - 1]
    limit = flops[near - 1] + Fraction(off, 1000)
    within = [context for context, value in enumerate(flops, 1) if value <= limit]
    found = accounting.balanced_context(accounting.weight_flops_per_token / limit)
    if not within:
        assert found is None or found > LAST
    elif least_beyond(mixers, causal) > limit:
        assert found == within[-1]
    elif found is not None:
        assert found >= within[-1]
    else:
        assert accounting.state_flops_per_token(MAX_CONTEXT) <= limit
    if found is not None:
        assert accounting.state_flops_per_token(found) <= limit < accounting.state_flops_per_token(found + 1)


@given(st.integers(1, 200), st.integers(0, 120), causals, st.integers(1, 90))
def test_least_keys_of_a_range(first: int, more: int, causal: Any, chunk: int) -> None:
    means = [mean_keys_in_chunks(context, causal, chunk) for context in range(first, first + more + 1)]
    assert least_keys_in_chunks(first, first + more, causal, chunk) == min(means)


@given(st.integers(1, 9), st.lists(st.integers(0, 30), min_size=9, max_size=9), st.integers(0, 60), st.integers(10, 70))
def test_periods_of_any_values(period: int, values: list[int], limit: int, highest: int) -> None:
    """A bound of a range that is no better than that of its first period does not change the answer."""

    def value(number: int) -> int:
        turn, place = divmod(number - 1, period)
        return values[place] + 2 * turn

    def least(first: int, last: int) -> int:
        return value(first) if first == last else min(values[:period]) + 2 * ((first - 1) // period)

    within = [number for number in range(1, highest) if value(number) <= limit]
    expected = within[-1] if within and value(highest) > limit else None
    assert last_at_most_in_periods(limit, least, period, highest) == expected


def test_chunks_a_little_longer_than_the_balance() -> None:
    """6,702 keys balance gpt2-small, and whole chunks of 13,500 have a mean of 6,750.5: dips come close for long.

    No dip is deeper than c^2/8t keys. From 470,200 tokens on that is too little.
    """
    accounting = Accounting(with_mixer(catalogue_spec("gpt2-small"), "chunked_attention:window=13500")[0])
    per_key, weights, c, end = 12 * 2 * 12 * (64 + 64), accounting.weight_flops_per_token, 13_500, 470_200
    assert per_key * (Fraction(c + 1, 2) - Fraction(c * c, 8 * end)) > weights
    assert accounting.balanced_context() == 466_354
    for t in range(466_354, end):
        pairs = t // c * c * (c + 1) + t % c * (t % c + 1)
        assert (per_key * pairs <= 2 * t * weights) == (t == 466_354)


def test_scout_is_in_balance_for_the_last_time() -> None:
    """Llama 4 Scout: chunks in 36 of 48 layers, and attention in 12, which outgrow the dips."""
    accounting = Accounting(catalogue_spec("llama-4-scout"))
    assert accounting.balanced_context() == 238_135
    weights = accounting.weight_flops_per_token
    per_key, c = 2 * 40 * (128 + 128), 8192
    for t in range(238_135, 238_135 + 3 * c):
        keys = 36 * Fraction(t // c * c * (c + 1) + t % c * (t % c + 1), 2 * t) + 12 * Fraction(t + 1, 2)
        assert (per_key * keys <= weights) == (t == 238_135)


@pytest.mark.parametrize("chunks", [(8192, 16_384), (8191, 8192), (4, 6), (2**49 + 1,), (2**40, 7)])
@pytest.mark.parametrize("less", [Fraction(1, 10), Fraction(1, 10**6)])
def test_searches_end_soon(chunks: tuple[int, ...], less: Fraction, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just below what whole chunks take, dips are within the limit for long; 28,742 values are the most here."""
    accounting = Accounting(spec_of([ChunkedAttention(**HEADS, window=window) for window in chunks]))
    least, asked = accounting._least_state_flops, []

    def counted(first: int, last: int) -> Fraction:
        asked.append(first)
        return least(first, last)

    monkeypatch.setattr(accounting, "_least_state_flops", counted)
    limit = PER_KEY * sum(Fraction(window + 1, 2) for window in chunks) * (1 - less)
    found = accounting.longest_context(limit)
    assert len(asked) < 40_000
    assert found is not None
    assert accounting.state_flops_per_token(found) <= limit < accounting.state_flops_per_token(found + 1)


def test_a_question_in_documents_is_found_in_no_form() -> None:
    """Memory sparse attention takes fewer FLOPs in some longer contexts, chunked or not."""
    spec = ModelSpec(name="x", vocab_size=9, hidden_size=8, layers=(LayerGroup(mixer=MemorySparse(**HEADS)),))
    for form in ("recurrent", "chunked"):
        assert Accounting(spec, Convention(form=form)).balanced_context() is None  # type: ignore[arg-type]


@given(st.integers(1, 150), chunked)
def test_a_prompt_costs_its_tokens_in_chunks(tokens: int, mixer: ChunkedAttention) -> None:
    each = [total(mixer.decode_flops_terms(position)) for position in range(1, tokens + 1)]
    assert sum(each) == tokens * total(mixer.state_flops_terms(tokens, Convention()))
    assert each[-1] == PER_KEY * ((tokens - 1) % mixer.restarts_after + 1)


@given(chunked, st.integers(1, 200), st.integers(1, 80))
def test_the_last_token_meets_its_chunk_within_a_budget(mixer: ChunkedAttention, context: int, budget: int) -> None:
    spec = spec_of([mixer])
    step, within = (Serving(Accounting(spec), context, policy=policy).step(3) for policy in (None, Policy(budget)))
    own = (context - 1) % mixer.restarts_after + 1
    for answer, keys in ((step, own), (within, min(own, budget))):
        weights = Accounting(spec).weight_flops_per_token
        assert answer.flops == 3 * (weights + PER_KEY * keys)
        assert answer.cache_bytes == 3 * 2 * 6 * (keys + 1)


def test_what_the_commands_say(capsys: pytest.CaptureFixture[str]) -> None:
    chunks = ["gpt2-small", "--mixer", "chunked_attention:window=13500"]
    assert main(["recommend", *chunks, "--solve", "context", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["value"], result["at"]["wsfr"] >= 1 > result["beyond"]["wsfr"]) == (466_354, True)
    assert main(["wsfr", *chunks, "--ctx", "8k"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("balanced at 466,354")
    message = "gpt2-small with log_linear has mixers whose state FLOPs per token can fall as the context grows"
    for form in ("recurrent", "chunked"):
        arguments = ["recommend", "gpt2-small", "--mixer", "log_linear", "--solve", "context", "--form", form]
        assert main(arguments) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: --solve context: {message}"
