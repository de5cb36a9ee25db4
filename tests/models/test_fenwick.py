"""Log-linear attention in chunks, pieces and steps against its definition over all pairs of tokens."""

from __future__ import annotations

from itertools import pairwise

import plain_mixers as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import MIXERS, spec_of
from msgspec.structs import replace
from recurrences import check_float32, check_gradients
from torch import Tensor

from powerplan.errors import InputError
from powerplan.models import Cache, build_layer, build_model
from powerplan.models.mixers.fenwick import log_linear_scan, log_linear_state, log_linear_step

NAMES = ("c", "b", "x", "log_g", "weight")
CHUNKS = st.sampled_from([1, 2, 4, 8, 32, 128])


def inputs(tokens: int, dtype: torch.dtype = torch.float64, strongest: float = 1.0) -> dict[str, Tensor]:
    """c, b [2, T, 2, 5], x [2, T, 4, 3], log_g [2, T, 4], weight [2, T, 4, 9]."""
    torch.manual_seed(tokens)
    c, b = (torch.randn(2, tokens, 2, 5, dtype=dtype) for _ in range(2))
    x = torch.randn(2, tokens, 4, 3, dtype=dtype)
    log_g = -strongest * torch.rand(2, tokens, 4, dtype=dtype) ** 3
    return dict(zip(NAMES, (c, b, x, log_g, torch.rand(2, tokens, 4, 9, dtype=dtype)), strict=True))


def by_pairs(given: dict[str, Tensor]) -> Tensor:
    outs = []
    for row in range(2):
        c, b, x, log_g, weight = (given[name][row].transpose(0, 1) for name in NAMES)
        c, b = (plain.by_group(part, x.shape[0]) for part in (c, b))
        outs.append(plain.log_linear_dense(c, b, x, log_g.exp()[..., None], weight).transpose(0, 1))
    return torch.stack(outs)


def scan(
    given: dict[str, Tensor], chunk_size: int, state: Tensor | None = None, past: int = 0
) -> tuple[Tensor, Tensor]:
    return log_linear_scan(**given, state=state, past_tokens=past, chunk_size=chunk_size)


@settings(max_examples=12)
@given(tokens=st.integers(1, 90), chunk_size=CHUNKS)
def test_chunks_equal_the_definition(tokens: int, chunk_size: int) -> None:
    given = inputs(tokens)
    torch.testing.assert_close(scan(given, chunk_size)[0], by_pairs(given))


@settings(max_examples=20)
@given(first=st.integers(1, 70), second=st.integers(1, 70), more=st.integers(0, 2))
def test_states_are_their_own_and_the_transition_times_those_before(first: int, second: int, more: int) -> None:
    given, levels = inputs(first + second), (first + second).bit_length() + more
    _, before = scan({name: x[:, :first] for name, x in given.items()}, 8)
    before = torch.cat((before, torch.zeros(2, levels - before.shape[1], *before.shape[2:], dtype=before.dtype)), 1)
    own, transition = log_linear_state(*(given[name][:, first:] for name in ("b", "x", "log_g")), first, levels)
    by_head = transition.unflatten(1, (2, 2))  # groups, heads of a group
    after = own + torch.einsum("bgrml,blgkrv->bmgkrv", by_head, before)
    expected = scan(given, 8)[1]
    torch.testing.assert_close(after[:, : expected.shape[1]], expected)
    assert not after[:, expected.shape[1] :].any()


def test_gradients_equal_those_of_the_definition() -> None:
    check_gradients(inputs(45), lambda given: scan(given, 8)[0], by_pairs)


@settings(max_examples=25)
@given(borders=st.lists(st.integers(1, 69), max_size=6, unique=True), chunk_size=CHUNKS)
def test_states_go_on_in_any_pieces(borders: list[int], chunk_size: int) -> None:
    """Pieces that begin within a chunk read states that merge with later tokens while they run."""
    given = inputs(70)
    whole, last = scan(given, 8)
    outs: list[Tensor] = []
    state: Tensor | None = None
    for start, stop in pairwise((0, *sorted(borders), 70)):
        out, state = scan({name: x[:, start:stop] for name, x in given.items()}, chunk_size, state, start)
        assert state.shape[1] == stop.bit_length()
        for bit in range(state.shape[1]):
            assert stop >> bit & 1 or not state[:, bit].any()
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    torch.testing.assert_close(state, last)


def test_steps_equal_the_definition() -> None:
    given = inputs(70)
    first, state = scan({name: x[:, :1] for name, x in given.items()}, 8)
    outs = [first]
    for index in range(1, 70):
        out, state = log_linear_step(**{name: x[:, index] for name, x in given.items()}, state=state, past_tokens=index)
        outs.append(out[:, None])
        assert state.shape[1] == (index + 1).bit_length()
    torch.testing.assert_close(torch.cat(outs, 1), by_pairs(given))
    torch.testing.assert_close(state, scan(given, 16)[1])


@pytest.mark.parametrize("strongest", [1.0, 19.0, 300.0])
def test_strong_decays_stay_finite_in_float32(strongest: float) -> None:
    """Sums of 64 log decays of up to 20 are rounded to 2^-24 of 1,280, and exponents are differences of two."""
    narrow, allowed = inputs(200, torch.float32, strongest), 4 * 64 * min(strongest, 20.0) * 2**-24
    check_float32(narrow, lambda given: scan(given, 64)[0], allowed)


def test_what_log_linear_refuses() -> None:
    mixer = MIXERS["log_linear"]
    with pytest.raises(
        InputError,
        match="chunk_size: log_linear layers are built with a power of 2, such as 32 or 64; 48 is none",
    ):
        build_layer(spec_of(replace(mixer, chunk_size=48)))
    model, cache = build_model(spec_of(replace(mixer, max_levels=5))), Cache()
    model(torch.zeros(1, 16, dtype=torch.long), cache)
    for tokens, own in ((17, None), (1, cache)):
        with pytest.raises(InputError, match="17 tokens do not fit max_levels 5, which reach 16"):
            model(torch.zeros(1, tokens, dtype=torch.long), own)
